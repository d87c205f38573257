"""RMSNorm and weighted residual as operators that torch.compile takes as they are.

Formulas in `kernels.norm.norm`. `triton` says whether Triton's kernels compute them. What an
operation lacks is None among its inputs, and has no elements among its results.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.norm import blocked
from kernels.target import launch_on


@torch.library.custom_op("transxssm::add_rms_norm", mutates_args=())
def add_rms_norm_operator(
    h: Tensor, update: Tensor | None, residual_weight: Tensor | None, norm_weight: Tensor | None,
    eps: float, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute h' = residual_weight ⊙ h + update and u = RMSNorm(h') ⊙ norm_weight, [..., N].

    Without an update there is no h', which would be h.
    """
    update = None if update is None else update.contiguous()
    with launch_on(h):
        new_h, u = implementation_of(triton).forward(
            h.contiguous(), update, residual_weight, norm_weight, eps
        )
    none = h.new_empty(0)
    return none if update is None else new_h, none.clone() if u is None else u


@torch.library.custom_op("transxssm::add_rms_norm_backward", mutates_args=())
def _backward(
    d_new_h: Tensor | None, d_u: Tensor | None, h: Tensor | None, new_h: Tensor | None,
    residual_weight: Tensor | None, norm_weight: Tensor | None, eps: float, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of h, update and both weights; of a residual alone that of update is d_new_h."""
    given = d_new_h if d_u is None else d_u
    assert given is not None
    with launch_on(given):
        d_h, d_update, *d_weights = implementation_of(triton).backward(
            None if d_new_h is None else d_new_h.contiguous(),
            None if d_u is None else d_u.contiguous(),
            h, new_h, residual_weight, norm_weight, eps,
        )  # fmt: skip
    none = given.new_empty(0)
    # copies: the results of an operator may share no memory
    d_residual, d_norm = (none.clone() if d is None else d.clone() for d in d_weights)
    return d_h, none if d_update is None or d_u is None else d_update, d_residual, d_norm


@cache
def implementation_of(triton: bool) -> ModuleType:
    """Return the module of `forward` and `backward`."""
    if triton:
        from kernels.norm import fused

        return fused
    return blocked


@add_rms_norm_operator.register_fake
def _(
    h: Tensor, update: Tensor | None, residual_weight: Tensor | None, norm_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _result(h, h.shape, update), _result(h, h.shape, norm_weight)


@_backward.register_fake
def _(
    d_new_h: Tensor | None, d_u: Tensor | None, h: Tensor | None, new_h: Tensor | None,
    residual_weight: Tensor | None, norm_weight: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = d_new_h if d_u is None else d_u
    assert given is not None
    both = None if d_u is None else h
    channels = given.shape[-1:]
    return (
        given.new_empty(given.shape), _result(given, given.shape, both),
        _result(given, channels, residual_weight), _result(given, channels, norm_weight),
    )  # fmt: skip


def _result(like: Tensor, shape: torch.Size, of: Tensor | None) -> Tensor:
    return like.new_empty(0 if of is None else shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, update, residual_weight, norm_weight, ctx.eps, ctx.triton = inputs
    new_h = h if update is None else output[0]
    ctx.save_for_backward(
        None if update is None else h,
        None if norm_weight is None else new_h,
        residual_weight,
        norm_weight,
    )


def _differentiate(ctx: Any, d_new_h: Tensor, d_u: Tensor) -> tuple[Tensor | None, ...]:
    h, new_h, residual_weight, norm_weight = ctx.saved_tensors
    d_h, d_update, d_residual, d_norm = _backward(
        None if h is None else d_new_h,
        None if norm_weight is None else d_u,
        h, new_h, residual_weight, norm_weight, ctx.eps, ctx.triton,
    )  # fmt: skip
    if h is None:
        return d_h, None, None, d_norm, None, None
    if norm_weight is None:
        return d_h, d_new_h, d_residual, None, None, None
    return d_h, d_update, d_residual, d_norm, None, None


add_rms_norm_operator.register_autograd(_differentiate, setup_context=_save)
