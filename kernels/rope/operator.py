"""The rotation as an operator that torch.compile takes as it is.

Formulas in `kernels.rope.rope`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.rope import blocked
from kernels.target import launch_on


@torch.library.custom_op("transxssm::rotate", mutates_args=())
def rotate_operator(
    tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, conjugate: bool, triton: bool
) -> list[Tensor]:
    """Rotate one or two tensors [B, L, H, D] by cos and ±sin [B, L, D/2] into contiguous ones.

    triton: whether Triton's kernel computes it.
    """
    given = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    out = [t.new_empty(t.shape) for t in tensors]
    if not triton:
        blocked.rotate(given, out, cos, sin, conjugate)
        return out
    from kernels.rope import fused

    with launch_on(cos):
        fused.rotate(given, out, cos, sin, conjugate)
    return out


@rotate_operator.register_fake
def _(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, cos, sin, ctx.conjugate, ctx.triton = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    turned = rotate_operator(grads, *ctx.saved_tensors, not ctx.conjugate, ctx.triton)
    return turned, None, None, None, None


rotate_operator.register_autograd(_differentiate, setup_context=_save)
