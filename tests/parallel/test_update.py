"""The update: clipped as the norm of all gradients says, and in few operations."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.parity import MODEL, synthetic_batch
from benchmarks.ranks import run_ranks

CLIP, LR, EPS, WEIGHT_DECAY = 0.01, 3e-3, 1e-2, 0.3
ALLOCATIONS_AND_VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
    "empty_strided", "expand", "narrow", "new_empty", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


def built_zero(parallel: dict[str, Any], dtype: torch.dtype, model: dict[str, Any]) -> Any:
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import forward_backward
    from parallel.zero import ZeroOptimizer

    launch, device, layout = launch_from_environment(), prepare_host(), ParallelConfig(**parallel)
    init_distributed(launch, device)
    init_groups(layout)
    built = build_stage(
        ModelConfig(**model), layout, seq_len=64, dtype=dtype, seed=5, deterministic=False,
        device=device,
    )  # fmt: skip
    zero = ZeroOptimizer(
        built, layout, lr=1.0, betas=(0.8, 0.9), eps=EPS, weight_decay=WEIGHT_DECAY,
        clip_grad_norm=CLIP,
    )  # fmt: skip
    batch = local_batch(synthetic_batch(0, range(launch.rank, launch.rank + 1), True), device)
    forward_backward(zero, [batch], torch.tensor(100.0, dtype=torch.float64))
    return zero


def update_and_its_formula(parallel: dict[str, Any], dtype: torch.dtype) -> tuple[float, ...]:
    """The norm by the step and by the gradients, and how far the weights are from AdamW's."""
    zero = built_zero(parallel, dtype, MODEL)
    before, gradients = zero.full_parameters(), zero.full_gradients()
    update = zero.step(LR)
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    furthest = 0.0
    for name, weight in zero.full_parameters().items():
        clipped = gradients[name].double() * CLIP / (norm + 1e-6)
        decay = WEIGHT_DECAY if zero.infos[name].decays else 0.0
        expected = before[name].double() * (1 - LR * decay) - LR * clipped / (clipped.abs() + EPS)
        furthest = max(furthest, float((weight - expected).abs().max() / LR))
    return update.grad_norm, norm, furthest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "optimizer"},
    ],
    ids=str,
)
def test_gradients_are_clipped_by_the_norm_of_all(
    parallel: dict[str, Any], dtype: torch.dtype
) -> None:
    for norm, expected, furthest in run_ranks(2, update_and_its_formula, parallel, dtype):
        assert norm == pytest.approx(expected, rel=1e-5)
        assert norm > 20 * CLIP
        assert furthest < 1e-4


class Operations(TorchDispatchMode):
    """Counts what would be issued to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) not in ALLOCATIONS_AND_VIEWS:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(dtype: torch.dtype) -> Counter[str]:
    zero = built_zero({}, dtype, MODEL | {"num_layers": 24})
    with Operations() as operations:
        zero.step(LR)
    return operations.counted


def test_many_layers_are_updated_in_few_operations_and_one_wait() -> None:
    (counted,) = run_ranks(1, operations_of_a_step, torch.bfloat16)
    assert counted["_local_scalar_dense"] == 1, counted
    assert counted.total() <= 40, counted
