"""Paths that only a GPU executes: each fails or lies here, and what training falls back to runs.

On a CPU, Triton's kernels and the products of CUDA are played by PyTorch.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.cross_entropy.fused
import kernels.norm.fused
import kernels.rope.fused
import kernels.ssd.fused
import kernels.swiglu.fused
from benchmarks.parity import MODEL
from benchmarks.ranks import run_ranks
from kernels import dispatch, paths
from kernels.cross_entropy import blocked as cross_entropy_in_torch
from kernels.norm import blocked as norm_in_torch
from kernels.rope import blocked as rope_in_torch
from kernels.slices import empty_together
from kernels.ssd.chunked import ssd_chunked
from kernels.ssd.tables import ScanTables
from kernels.swiglu.naive import swiglu_naive
from parallel import products, self_check
from parallel.config import ModelConfig
from parallel.self_check import CHECKS, SelfCheckError, failures, run_checks

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SMALL = ModelConfig(hidden_size=64, head_dim=16, state_dim=16)
Patch = Callable[[Any, str, Any], None]


def swiglu_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (gate, up)]
    with torch.enable_grad():
        exact = torch.autograd.grad(swiglu_naive(*leaves).to(d_out.dtype), leaves, d_out)
    found = empty_together(gate, up)
    for target, gradient in zip(found, exact, strict=True):
        target.copy_(gradient)
    return found


def scan_in_torch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, tables: ScanTables, dt_bias: Tensor,
    chunk_size: int, initial_state: Tensor | None, D: Tensor | None, log_A: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `kernels.ssd.fused.ssd_fused`."""
    A = -A.float().exp() if log_A else A
    return ssd_chunked(
        x, dt, A, B, C, tables.cos, tables.sin, dt_bias, tables.cu_seqlens, chunk_size,
        initial_state, D,
    )  # fmt: skip


def rotate_in_torch(
    tensors: Sequence[Tensor], out: Sequence[Tensor], cos: Tensor, sin: Tensor, conjugate: bool,
    copied: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """As `kernels.rope.fused.rotate`."""
    rope_in_torch.rotate(tensors, out, cos, sin, conjugate)
    if copied is not None:
        copied[1].copy_(copied[0])


# What stands for a kernel, by operation: where Triton's is, and PyTorch's
STAND_INS: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "cross_entropy": [
        (kernels.cross_entropy.fused, "statistics", cross_entropy_in_torch.statistics),
        (kernels.cross_entropy.fused, "finish", cross_entropy_in_torch.finish),
    ],
    "norm": [
        (kernels.norm.fused, "forward", norm_in_torch.forward),
        (kernels.norm.fused, "backward", norm_in_torch.backward),
    ],
    "swiglu": [
        (kernels.swiglu.fused, "forward", lambda g, u: swiglu_naive(g, u).to(g.dtype)),
        (kernels.swiglu.fused, "backward", swiglu_backward),
    ],
    "rope": [(kernels.rope.fused, "rotate", rotate_in_torch)],
    "ssd": [(kernels.ssd.fused, "ssd_fused", scan_in_torch)],
}


def product_of_cuda(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any, out: Any) -> Tensor:
    """torch.addmm with out_dtype, which the CPU has not."""
    assert out is total
    assert out_dtype == torch.float32
    return total.add_(a.float() @ b.float())


def first_product_of_cuda(a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Any = None) -> Any:
    assert out_dtype == torch.float32
    return a.float() @ b.float()


class TorchOfCuda:
    """The module `torch`, as `parallel.products` sees it on a GPU."""

    def __init__(self, addmm: Any = product_of_cuda, mm: Any = first_product_of_cuda) -> None:
        self.addmm, self.mm = addmm, mm

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def be_a_gpu(patch: Patch, **products_of_cuda: Any) -> None:
    """Take every path that a GPU takes."""
    patch(dispatch, "interpreting", lambda: True)
    for stand_ins in STAND_INS.values():
        for module, name, function in stand_ins:
            patch(module, name, function)
    patch(products, "torch", TorchOfCuda(**products_of_cuda))
    for module in (products, self_check):
        patch(module, "can_sum_inside", lambda device: True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("TRANSXSSM_KERNELS", "triton")
    monkeypatch.setattr(paths, "_off", set())
    monkeypatch.setattr(dispatch, "chosen", {"ssd": {"triton"}})
    be_a_gpu(monkeypatch.setattr)
    # on a CPU they are not taken, being for so many programs
    some = [replace(c, is_taken=lambda _: False) if c.path == paths.SCAN_SEGMENTS else c
            for c in CHECKS]  # fmt: skip
    monkeypatch.setattr(self_check, "CHECKS", some)
    return monkeypatch


def test_all_paths_that_agree_stay_on(gpu: pytest.MonkeyPatch) -> None:
    outcomes = list(run_checks(SMALL, CPU, BF16))
    assert [check.path for check, _ in outcomes] == [
        paths.FLOAT32_SUMS, "cross_entropy", "rms_norm", "weighted_residual", "add_rms_norm",
        "swiglu", "rotate_qk", "apply_rope", "ssd", paths.COLUMN_SLICES,
    ]  # fmt: skip
    assert all(reason is None for _, reason in outcomes), outcomes
    assert not any(paths.is_off(check.path) for check in CHECKS)
    assert dispatch.chosen == {"ssd": {"triton"}}  # what checks choose has not run


def test_on_a_cpu_nothing_is_checked() -> None:
    assert list(run_checks(SMALL, CPU, BF16)) == []


def lying(function: Callable[..., Any]) -> Callable[..., Any]:
    """A tenth too much in every result."""

    def lie(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        several = isinstance(result, tuple)
        wrong = [r if r is None else r * 1.1 for r in (result if several else (result,))]
        return tuple(wrong) if several else wrong[0]

    return lie


def raising(function: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution")

    return fail


FAULTS = [
    ("swiglu", 0, ["swiglu"]),
    ("swiglu", 1, ["swiglu"]),
    ("norm", 0, ["rms_norm", "weighted_residual", "add_rms_norm"]),
    ("norm", 1, ["rms_norm", "weighted_residual", "add_rms_norm"]),
    ("ssd", 0, ["ssd"]),
    ("cross_entropy", 0, ["cross_entropy"]),
]


@pytest.mark.parametrize("fault", [lying, raising])
@pytest.mark.parametrize(("kernel", "part", "expected"), FAULTS)
def test_a_kernel_that_fails_or_lies_is_named_and_replaced(
    kernel: str, part: int, expected: list[str], fault: Any, gpu: pytest.MonkeyPatch
) -> None:
    module, name, function = STAND_INS[kernel][part]
    gpu.setattr(module, name, fault(function))
    found = failures(SMALL, CPU, BF16)
    assert list(found) == expected
    word = "no kernel image is available" if fault is raising else "differ by"
    assert all(word in reason and "\n" not in reason for reason in found.values())
    for op in expected:
        assert dispatch.choose(op, CPU, None) == "torch"
    assert failures(SMALL, CPU, BF16) == {}  # what is off is not used any more


def test_kernels_that_write_in_place_are_checked(gpu: pytest.MonkeyPatch) -> None:
    def rotate(tensors: Any, out: Any, cos: Tensor, sin: Tensor, conjugate: bool) -> None:
        rope_in_torch.rotate(tensors, out, cos, sin, not conjugate)

    gpu.setattr(kernels.rope.fused, "rotate", rotate)
    gpu.setattr(
        kernels.cross_entropy.fused,
        "finish",
        lambda logits, *args: cross_entropy_in_torch.finish(logits.clone(), *args),
    )
    assert list(failures(SMALL, CPU, BF16)) == ["cross_entropy", "rotate_qk", "apply_rope"]


def test_one_token_that_is_wrong_is_found(gpu: pytest.MonkeyPatch) -> None:
    def scan(*args: Any) -> Any:
        y, state = ssd_chunked(*args)
        return torch.cat((y[:, :-1], -y[:, -1:]), 1), state

    gpu.setattr(kernels.ssd.fused, "ssd_fused", scan)
    assert list(failures(SMALL, CPU, BF16)) == ["ssd"]


def test_one_channel_that_is_wrong_is_found(gpu: pytest.MonkeyPatch) -> None:
    def forward(*args: Any) -> tuple[Tensor, Tensor | None]:
        new_h, u = norm_in_torch.forward(*args)
        if u is not None:
            u[..., -1] += 1
        return new_h, u

    gpu.setattr(kernels.norm.fused, "forward", forward)
    wide = SMALL.model_copy(update={"hidden_size": 4096})
    found = failures(wide, CPU, BF16)
    assert list(found) == ["rms_norm", "add_rms_norm"]
    assert all(reason.startswith("a row or column differs by ") for reason in found.values())


def test_numbers_that_are_not_finite_are_found(gpu: pytest.MonkeyPatch) -> None:
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        out = swiglu_naive(gate, up).to(gate.dtype)
        out[0] = float("nan")
        return out

    gpu.setattr(kernels.swiglu.fused, "forward", forward)
    assert list(failures(SMALL, CPU, BF16)) == ["swiglu"]


def test_kernels_wrong_on_slices_alone_read_copies(gpu: pytest.MonkeyPatch) -> None:
    def forward(gate: Tensor, up: Tensor) -> Tensor:  # as if rows were as wide as the tensor
        gate = gate.as_strided(gate.shape, (gate.shape[-1], gate.shape[-1], 1))
        return swiglu_naive(gate, up).to(gate.dtype)

    gpu.setattr(kernels.swiglu.fused, "forward", forward)
    assert list(failures(SMALL, CPU, BF16)) == [paths.COLUMN_SLICES]
    parts = self_check.columns(torch.randn(4, 1, 16), (3, 5))
    assert all(part.is_contiguous() for part in parts)


def add_only_to_zero(total: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
    return total.copy_(a.float() @ b.float())


def add_elsewhere(total: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
    return total + a.float() @ b.float()


def add_and_clear_the_next(total: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
    """Writes one number too many."""
    total.as_strided((1,), (1,), total.storage_offset() + total.numel()).zero_()
    return total.add_(a.float() @ b.float())


@pytest.mark.parametrize(
    "faulty",
    [
        {"addmm": add_only_to_zero},
        {"addmm": add_elsewhere},
        {"addmm": add_and_clear_the_next},
        {"addmm": raising(product_of_cuda)},
        {"mm": lying(first_product_of_cuda)},
    ],
    ids=["overwrites", "not in place", "one too many", "raises", "first"],
)
def test_products_that_fail_or_lie_are_rounded_before_they_are_summed(
    faulty: dict[str, Any], gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(products, "torch", TorchOfCuda(**faulty))
    assert list(failures(SMALL, CPU, BF16)) == [paths.FLOAT32_SUMS]
    a, b, total = torch.randn(3, 4).bfloat16(), torch.randn(4, 2).bfloat16(), torch.randn(3, 2)
    expected = total + (a @ b).float()
    assert torch.equal(products.add_product(total, a, b), expected)


def test_a_plain_path_that_fails_too_is_an_error(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(kernels.norm.fused, "forward", raising(norm_in_torch.forward))
    gpu.setattr(norm_in_torch, "forward", raising(norm_in_torch.forward))
    with pytest.raises(SelfCheckError, match="rms_norm: what would run in its place fails as well"):
        failures(SMALL, CPU, BF16)


def test_a_device_that_computes_no_more_is_an_error(gpu: pytest.MonkeyPatch) -> None:
    def forward(*_: Any) -> Tensor:
        gpu.setattr(self_check.torch, "zeros", raising(torch.zeros))
        raise RuntimeError("an illegal memory access was encountered")

    gpu.setattr(kernels.norm.fused, "forward", forward)
    message = "rms_norm left cpu unusable: RuntimeError: an illegal memory access was encountered;"
    with pytest.raises(SelfCheckError, match=message):
        failures(SMALL, CPU, BF16)


# -- ranks -----------------------------------------------------------------------------------------


def proved(faulty_rank: int | None, strict: str) -> tuple[Any, ...]:
    """What a rank finds, logs and trains with, where the products of one rank's GPU are wrong."""
    import os

    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from tests.parallel.test_update import built_zero

    launch, device = launch_from_environment(), prepare_host()
    init_distributed(launch, device)
    init_groups(ParallelConfig())
    for module in (products, self_check):
        module.can_sum_inside = lambda device: True  # type: ignore[attr-defined]
    mine = launch.rank == faulty_rank
    products.torch = TorchOfCuda(addmm=add_only_to_zero if mine else product_of_cuda)  # type: ignore[assignment]
    os.environ["TRANSXSSM_STRICT"] = strict
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transxssm").addHandler(handler)
    try:
        reasons = self_check.prove(ModelConfig(**MODEL), device, BF16)
    except SelfCheckError as error:
        return (str(error),)
    zero = built_zero({}, BF16, MODEL)
    return reasons, lines, paths.is_off(paths.FLOAT32_SUMS), zero.full_gradients()


def test_all_ranks_leave_a_path_that_fails_on_one() -> None:
    first, second = run_ranks(2, proved, 1, "0")
    (reason,) = first[0].values()
    assert list(first[0]) == [paths.FLOAT32_SUMS]
    assert first[0] == second[0]
    assert reason.startswith("rank 1: results differ by ")
    (line,) = first[1]
    assert line == (
        f"{paths.FLOAT32_SUMS} failed its check on the device: {reason}; on all ranks weight"
        " gradients are rounded before they are summed instead"
    )
    assert second[1] == []
    assert first[2]
    assert second[2]
    # and trains as a CPU does
    from tests.parallel.test_main_grads import gradients_of_a_step

    for found, expected in zip((first, second), run_ranks(2, gradients_of_a_step), strict=True):
        assert all(torch.equal(found[3][name], g) for name, g in expected.items())


def test_ranks_that_agree_keep_the_path() -> None:
    (found,) = run_ranks(1, proved, None, "0")
    assert found[:3] == ({}, [], False)
    from tests.parallel.test_main_grads import gradients_of_a_step

    (plain,) = run_ranks(1, gradients_of_a_step)
    differing = [name for name, g in plain.items() if not torch.equal(found[3][name], g)]
    assert "model.layers.0.ssd.x_proj.weight" in differing  # not rounded


def test_strict_mode_stops_all_ranks() -> None:
    for (message,) in run_ranks(2, proved, 1, "1"):
        assert message.startswith(f"{paths.FLOAT32_SUMS}: rank 1: results differ by ")
        assert message.endswith(" (strict mode)")
