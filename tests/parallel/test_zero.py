"""bf16 training sums gradients in float32: over micro-batches, and over ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity import MODEL, assemble, synthetic_batch
from benchmarks.ranks import run_ranks
from parallel.params import ParamInfo

MICRO_BATCHES = 16
Gradients = dict[str, tuple[ParamInfo, Tensor]]


def summed_gradients(
    parallel: dict[str, Any],
    apart: bool,
    model: dict[str, Any] = MODEL,
    dtype: torch.dtype = torch.bfloat16,
) -> Gradients:
    """This rank's, over micro-batches of one row; `apart`: of each alone, summed here."""
    from parallel import zero as zero_module
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import forward_backward
    from parallel.zero import ZeroOptimizer

    if not apart:  # many buckets, the last one ragged; and little that stays gathered
        zero_module.BUCKET_ELEMENTS, zero_module.GATHERED_ELEMENTS = 3000, 5000
    launch, device, layout = launch_from_environment(), prepare_host(), ParallelConfig(**parallel)
    init_distributed(launch, device)
    init_groups(layout)
    built = build_stage(
        ModelConfig(**model), layout, seq_len=64, dtype=dtype, seed=5,
        deterministic=False, device=device,
    )  # fmt: skip
    zero = ZeroOptimizer(
        built, layout, lr=0.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, clip_grad_norm=0.0
    )
    share = MICRO_BATCHES // launch.world_size
    rows = range(launch.rank * share, (launch.rank + 1) * share)
    batches = [local_batch(synthetic_batch(0, range(at, at + 1), True), device) for at in rows]
    found: dict[str, Tensor] = {}
    tokens = torch.tensor(1000.0, dtype=torch.float64)
    for part in [[batch] for batch in batches] if apart else [batches]:
        forward_backward(zero, part, tokens)
        for name, gradient in zero.full_gradients().items():
            found[name] = found.get(name, 0) + gradient.float()
        zero.step(0.0)
    return {name: (built.infos[name], gradient) for name, gradient in found.items()}


@pytest.fixture(scope="module")
def expected() -> dict[bool, dict[str, Tensor]]:
    """By whether DeepSpeed reduces in backward: the head's gradients are rounded before then."""
    return {
        stage > 1: assemble(run_ranks(1, summed_gradients, {"zero_stage": stage}, True))
        for stage in (1, 2)
    }


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), (2, {}), (2, {"zero_stage": 0}), (2, {"zero_stage": 2}), (2, {"zero_stage": 3})],
    ids=str,
)
def test_sums_of_bf16_gradients_are_float32(
    ranks: int, parallel: dict[str, Any], expected: dict[bool, dict[str, Tensor]]
) -> None:
    found = assemble(run_ranks(ranks, summed_gradients, parallel, False))
    alone = expected[parallel.get("zero_stage", 1) > 1]
    errors = {name: (found[name] - g).norm() / g.norm() for name, g in alone.items()}
    assert found.keys() == alone.keys()
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_an_odd_number_of_parameters_is_trained(zero_stage: int) -> None:
    """DeepSpeed wants an even number of elements in a bucket, and ours has those of the model."""
    odd = MODEL | {"num_layers": 2, "num_heads": 3, "num_kv_heads": 3, "ssd_groups": 3}
    layout = {"zero_stage": zero_stage}
    (found,) = run_ranks(1, summed_gradients, layout, True, odd, torch.float32)
    assert sum(gradient.numel() for _, gradient in found.values()) % 2 == 1
    assert all(gradient.any() for _, gradient in found.values())


def step_with_infinite_gradient(dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether the update was applied, and whether any weight has changed."""
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import forward_backward
    from parallel.zero import ZeroOptimizer

    device, layout = prepare_host(), ParallelConfig()
    init_distributed(launch_from_environment(), device)
    init_groups(layout)
    built = build_stage(
        ModelConfig(**MODEL), layout, seq_len=64, dtype=dtype, seed=5, deterministic=False,
        device=device,
    )  # fmt: skip
    zero = ZeroOptimizer(
        built, layout, lr=0.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip_grad_norm=1.0
    )
    batch = local_batch(synthetic_batch(0, range(1), True), device)
    # by so few tokens that gradients overflow
    forward_backward(zero, [batch], torch.tensor(1e-300, dtype=torch.float64))
    before = zero.full_parameters()
    applied = zero.step(1e-2).applied  # the caller refuses nothing
    after = zero.full_parameters()
    return applied, any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype) -> None:
    assert run_ranks(1, step_with_infinite_gradient, dtype) == [(False, False)]
