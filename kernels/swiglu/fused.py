"""The SwiGLU product in Triton: one launch forward, one backward; every element moved once.

gate, up and their gradients are rows at equal distances, such as column slices of one buffer; the
product is contiguous. Formulas in `kernels.swiglu.swiglu`.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.slices import TOKENS, empty_together, row_stride

# 8 elements a thread: one access of 128 bits an array for 16-bit types, two for float32. The same
# for every architecture: enough programs are resident to keep memory busy.
NUM_WARPS = 4
BLOCK = NUM_WARPS * 32 * 8


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    out = gate.new_empty(gate.shape)
    if gate.numel():
        swiglu_forward_kernel[(-(-gate.numel() // BLOCK),)](
            gate, up, out, gate.numel(),
            **_rows(GATE=gate, UP=up), WIDTH=_width(gate), BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, slices of one buffer where those are; d_out is contiguous."""
    d_gate, d_up = empty_together(gate, up)
    if gate.numel():
        swiglu_backward_kernel[(-(-gate.numel() // BLOCK),)](
            d_out, gate, up, d_gate, d_up, gate.numel(),
            **_rows(GATE=gate, UP=up, D_GATE=d_gate), WIDTH=_width(gate), BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return d_gate, d_up


def _width(tensor: Tensor) -> int:
    """Elements of a token."""
    return tensor.shape[TOKENS:].numel()


def _rows(**tensors: Tensor) -> dict[str, int | None]:
    return {f"{name}_ROW": row_stride(tensor) for name, tensor in tensors.items()}


def forward_traffic(elements: int, itemsize: int) -> tuple[int, int]:
    """Bytes loaded and stored by the forward kernel."""
    return 2 * elements * itemsize, elements * itemsize


def backward_traffic(elements: int, itemsize: int) -> tuple[int, int]:
    """Bytes loaded and stored by the backward kernel."""
    return 3 * elements * itemsize, 2 * elements * itemsize


@triton.jit
def swiglu_forward_kernel(
    gate, up, out, elements,
    GATE_ROW: tl.constexpr, UP_ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    row, column = at // WIDTH, at % WIDTH
    g = tl.load(gate + row * GATE_ROW + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * UP_ROW + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    d_out, gate, up, d_gate, d_up, elements,
    GATE_ROW: tl.constexpr, UP_ROW: tl.constexpr, D_GATE_ROW: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of d_gate and d_up are equally far apart."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    row, column = at // WIDTH, at % WIDTH
    d = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * GATE_ROW + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * UP_ROW + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    dg = d * u * sigmoid * (1 + g * (1 - sigmoid))
    to = row * D_GATE_ROW + column
    tl.store(d_gate + to, dg.to(d_gate.dtype.element_ty), mask=mask)
    tl.store(d_up + to, (d * g * sigmoid).to(d_up.dtype.element_ty), mask=mask)
