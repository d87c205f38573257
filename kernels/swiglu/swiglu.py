"""The product of a gated feed-forward, one pass over memory instead of two.

    o = silu(gate) ⊙ up          silu(g) = g σ(g)          σ(g) = 1 / (1 + exp(-g))

    d_up   = do ⊙ silu(gate)
    d_gate = do ⊙ up ⊙ σ(gate) (1 + gate (1 - σ(gate)))

Triton's backward recomputes σ from gate; torch's saves silu(gate) too, as autograd composes it: a
second exponential costs a CPU more than the memory traffic that it spares.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from kernels.checks import check_floating, check_tensor, once_per_shape
from kernels.dispatch import choose
from kernels.slices import empty_together, row_stride
from kernels.swiglu.naive import swiglu_naive
from kernels.swiglu.operator import swiglu_operator
from kernels.target import launch_on


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up in gate's dtype; gate and up of one shape, floating dtype and device.

    Where gate and up are column slices of one buffer, backward writes their gradients into another
    like it (`kernels.slices`). Triton computes in float32 and rounds once; what is neither
    contiguous nor rows at equal distances is copied there.

    Raises ValueError for unequal shapes or devices, TypeError for a wrong dtype.
    """
    _check(gate, up)
    unsupported = "Triton kernels compute in float32, not float64"
    choice = choose("swiglu", gate.device, unsupported if gate.dtype == torch.float64 else None)
    if choice == "naive":
        return swiglu_naive(gate, up).to(gate.dtype)
    if is_dynamo_compiling():
        compiled: Tensor = swiglu_operator(gate, up, choice == "triton")
        return compiled
    function = _TorchSwiGLU if choice == "torch" else _FusedSwiGLU
    product: Tensor = function.apply(gate, up)
    return product


@once_per_shape
def _check(gate: Tensor, up: Tensor) -> None:
    check_floating("gate", gate)
    check_tensor("up", up, gate.shape, (gate.dtype,), gate.device)


class _TorchSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        silu = F.silu(gate)
        if not any(ctx.needs_input_grad):
            return silu.mul_(up)
        ctx.save_for_backward(gate, up, silu)
        return silu * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, silu = ctx.saved_tensors
        d_gate, d_up = empty_together(gate, up)
        torch.mul(d_out, silu, out=d_up)
        torch.mul(d_out, up, out=d_gate)
        torch.ops.aten.silu_backward(d_gate, gate, grad_input=d_gate)
        return d_gate, d_up


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from kernels.swiglu import fused

        gate, up = (t if row_stride(t) else t.contiguous() for t in (gate, up))
        ctx.save_for_backward(gate, up)
        with launch_on(gate):
            return fused.forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        from kernels.swiglu import fused

        return fused.backward(d_out.contiguous(), *ctx.saved_tensors)
