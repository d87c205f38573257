"""The SwiGLU product in Triton: one launch forward, one backward; every element moved once.

All tensors contiguous and of one shape; formulas in `kernels.swiglu.swiglu`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 elements a thread: one access of 128 bits an array for 16-bit types, two for float32. The same
# for every architecture: enough programs are resident to keep memory busy.
NUM_WARPS = 4
BLOCK = NUM_WARPS * 32 * 8


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    out = torch.empty_like(gate)
    if gate.numel():
        swiglu_forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out


def backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        swiglu_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            d_out, gate, up, d_gate, d_up, gate.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return d_gate, d_up


def forward_traffic(elements: int, itemsize: int) -> tuple[int, int]:
    """Bytes loaded and stored by the forward kernel."""
    return 2 * elements * itemsize, elements * itemsize


def backward_traffic(elements: int, itemsize: int) -> tuple[int, int]:
    """Bytes loaded and stored by the backward kernel."""
    return 3 * elements * itemsize, 2 * elements * itemsize


@triton.jit
def swiglu_forward_kernel(gate, up, out, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(d_out, gate, up, d_gate, d_up, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    d = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    dg = d * u * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(d_gate + at, dg.to(d_gate.dtype.element_ty), mask=mask)
    tl.store(d_up + at, (d * g * sigmoid).to(d_up.dtype.element_ty), mask=mask)
