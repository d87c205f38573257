"""Operations for torch.compile, by name: each as one graph, and what it computes eagerly."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.norm.norm import add_rms_norm, branch_rms_norm, weighted_residual
from kernels.norm.operator import add_rms_norm_operator
from kernels.rope.operator import rotate_operator
from kernels.rope.rope import apply_rope, rotate_qkv
from kernels.rope.table import rotary_cos_sin
from kernels.ssd.ssd import ssd, ssd_from_log
from kernels.swiglu.operator import swiglu_operator
from kernels.swiglu.swiglu import swiglu
from tests.kernels.operation_cases import TOLERANCE, normal, outputs_and_gradients, side_by_side
from tests.kernels.scan_cases import make_inputs, relative_error

EPS = 1e-5
ROWS = (2, 9)


def _tables(dim: int) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_cos_sin(torch.arange(ROWS[1]), dim, 10000.0, {})
    return cos.expand(*ROWS, -1).contiguous(), sin.expand(*ROWS, -1).contiguous()


def _scan(scan: Callable[..., Any], log_A: bool, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    inputs = make_inputs(2, 37, groups=2, documents=[5, 20], dtype=dtype)
    if log_A:
        inputs["A_log"] = (-inputs.pop("A")).log()
        inputs["initial_state"] = inputs["D"] = None
    fixed = {n: inputs.pop(n) for n in ("cos", "sin", "cu_seqlens")}
    names = [n for n, t in inputs.items() if t is not None]

    def call(*tensors: Tensor) -> Any:
        return scan(**dict(zip(names, tensors, strict=True)), **fixed, chunk_size=16)

    return call, [inputs[n] for n in names]


def case(name: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    """An operation and its differentiable inputs; some lie side by side in one buffer."""
    h, update = normal(*ROWS, 40, dtype=dtype), normal(*ROWS, 40, dtype=dtype, seed=1)
    r, w = normal(40, dtype=dtype, seed=2), normal(40, dtype=dtype, seed=3)
    q, k, v = (normal(*ROWS, n, 16, dtype=dtype, seed=n) for n in (4, 2, 3))
    cos, sin = _tables(16)
    cases: dict[str, Callable[[], tuple[Any, list[Tensor]]]] = {
        "norm": lambda: (partial(branch_rms_norm, eps=EPS), [h, w]),
        "residual": lambda: (weighted_residual, [h, update, r]),
        "residual and norm": lambda: (partial(add_rms_norm, eps=EPS), [h, update, r, w]),
        "feed-forward": lambda: (swiglu, side_by_side([h, update], 8)),
        "rotation": lambda: (lambda q: apply_rope(q, cos, sin), [q]),
        "rotations": lambda: (
            lambda q, k, v: rotate_qkv(q, k, v, cos, sin), side_by_side([q, k, v[:, :, :2]]),
        ),
        "scan": lambda: _scan(partial(ssd, output_final_state=True), False, dtype),
        "scan of logarithms": lambda: _scan(ssd_from_log, True, dtype),
    }  # fmt: skip
    return cases[name]()


CASES = (
    "norm", "residual", "residual and norm", "feed-forward", "rotation", "rotations", "scan",
    "scan of logarithms",
)  # fmt: skip


def assert_compiles(name: str, dtype: torch.dtype) -> None:
    """As one graph, an operation and its gradients are those of eager execution, but for rounding.

    Autograd may add a gradient of its own in the inputs' dtype, and a vector's remainder may be
    computed by other instructions.
    """
    operation, inputs = case(name, dtype)
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(compiled, inputs)
    for one, other in zip(found, outputs_and_gradients(operation, inputs), strict=True):
        assert relative_error(one, other) <= TOLERANCE[dtype]


def assert_registered(triton: bool) -> None:
    """PyTorch's own checks of operators: schema, fakes, autograd, and tracing in both."""
    h, update, r, w = (
        t.detach().requires_grad_() for t in case("residual and norm", torch.float32)[1]
    )
    for given in ((h, update, r, w), (h, None, None, w), (h, update, r, None)):
        torch.library.opcheck(add_rms_norm_operator, (*given, EPS, triton))
    torch.library.opcheck(swiglu_operator, (h, update, triton))
    q, k = (normal(*ROWS, n, 16).requires_grad_() for n in (4, 2))
    for tensors in ([q], [q, k]):
        torch.library.opcheck(rotate_operator, (tensors, *_tables(16), False, triton))
