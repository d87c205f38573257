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

from kernels.checks import check_floating, check_tensor
from kernels.dispatch import choose
from kernels.swiglu.naive import swiglu_naive
from kernels.target import launch_on


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up in gate's dtype; gate and up of one shape, floating dtype and device.

    Triton computes in float32 and rounds once; memory that is not contiguous is copied there.

    Raises ValueError for unequal shapes or devices, TypeError for a wrong dtype.
    """
    check_floating("gate", gate)
    check_tensor("up", up, gate.shape, (gate.dtype,), gate.device)
    unsupported = "Triton kernels compute in float32, not float64"
    choice = choose("swiglu", gate.device, unsupported if gate.dtype == torch.float64 else None)
    if choice == "naive":
        return swiglu_naive(gate, up).to(gate.dtype)
    if choice == "torch":
        return F.silu(gate) * up
    product: Tensor = _FusedSwiGLU.apply(gate.contiguous(), up.contiguous())
    return product


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from kernels.swiglu import fused

        ctx.save_for_backward(gate, up)
        with launch_on(gate):
            return fused.forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        from kernels.swiglu import fused

        return fused.backward(d_out.contiguous(), *ctx.saved_tensors)
