"""The SwiGLU product as operators that torch.compile takes as they are.

Formulas in `kernels.swiglu.swiglu`. `triton` says whether Triton's kernels compute them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.slices import row_stride
from kernels.target import launch_on


@torch.library.custom_op("transxssm::swiglu", mutates_args=())
def swiglu_operator(gate: Tensor, up: Tensor, triton: bool) -> Tensor:
    """Compute silu(gate) ⊙ up, contiguous."""
    if not triton:
        return F.silu(gate.contiguous()).mul_(up)
    from kernels.swiglu import fused

    with launch_on(gate):
        return fused.forward(*_rows(gate, up))


@torch.library.custom_op("transxssm::swiglu_backward", mutates_args=())
def _backward(d_out: Tensor, gate: Tensor, up: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    gate, up = _rows(gate, up)
    if not triton:
        d_gate = d_out * up
        torch.ops.aten.silu_backward(d_gate, gate, grad_input=d_gate)
        return d_gate.contiguous(), (d_out * F.silu(gate)).contiguous()
    from kernels.swiglu import fused

    with launch_on(gate):
        d_gate, d_up = fused.backward(d_out.contiguous(), gate, up)
    # the results of an operator may not share memory
    return d_gate.contiguous(), d_up.contiguous()


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if row_stride(t) else t.contiguous() for t in tensors)


@swiglu_operator.register_fake
def _(gate: Tensor, up: Tensor, triton: bool) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward.register_fake
def _(d_out: Tensor, gate: Tensor, up: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    gate, up, ctx.triton = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(d_out, *ctx.saved_tensors, ctx.triton), None


swiglu_operator.register_autograd(_differentiate, setup_context=_save)
