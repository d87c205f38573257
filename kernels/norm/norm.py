"""RMSNorm and the weighted residual before it, alone and in one pass over memory.

    h' = r ⊙ h + update                          r [N], a weight per channel
    u  = h' / sqrt(mean(h'²) + eps) ⊙ w          mean over the N channels; w [N]

Backward recomputes the statistics and saves only what the caller holds anyway: h, h' and the
weights. With s = 1/sqrt(mean(h'²) + eps):

    dh' += s (w ⊙ du) - h' s³ mean(h' ⊙ w ⊙ du)
    dh  = r ⊙ dh'      d_update = dh'      dr = Σ dh' ⊙ h      dw = Σ s h' ⊙ du     (over rows)

A residual stream has two readers, the norm and the next residual. Operations that return h' beside
u take the gradients of both, so autograd has nothing left to add.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from kernels.checks import check_floating, check_tensor, once_per_shape
from kernels.dispatch import Choice, choose
from kernels.norm.naive import rms_norm_naive, weighted_residual_naive
from kernels.norm.operator import add_rms_norm_operator, implementation_of
from kernels.target import launch_on

# A row lives in the registers of one Triton program: 16 warps of 32 threads with 32 bytes each.
_MAX_ROW_BYTES = 16 * 32 * 32


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """u = RMSNorm(h) ⊙ weight; [..., N] in h's dtype.

    h [..., N] floating, weight [N] of h's dtype; statistics and products in float32 (float64 for
    float64), rounded once. Memory that is not contiguous is copied.

    Raises ValueError for a wrong shape or device, TypeError for a wrong dtype.
    """
    return branch_rms_norm(h, weight, eps)[1]


def branch_rms_norm(h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h and u = RMSNorm(h) ⊙ weight, for an h that is read again.

    Whoever reads the returned h leaves its gradient to this operation's backward, which adds that
    of the norm in the same pass. The returned h is a view of the given one, or a contiguous copy.
    Otherwise as rms_norm.
    """
    both: tuple[Tensor, Tensor] = _run("rms_norm", h, None, None, weight, eps)
    return both


def weighted_residual(h: Tensor, update: Tensor, weight: Tensor) -> Tensor:
    """h' = weight ⊙ h + update; [..., N] in h's dtype, rounded once.

    h, update [..., N] and weight [N] of one floating dtype. Raises as rms_norm.
    """
    new_h: Tensor = _run("weighted_residual", h, update, weight, None, 0.0)
    return new_h


def add_rms_norm(
    h: Tensor, update: Tensor, residual_weight: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """h' = residual_weight ⊙ h + update and u = RMSNorm(h') ⊙ norm_weight, both [..., N].

    The statistics are those of h' as returned, in h's dtype. h, update [..., N] and both weights
    [N] of one floating dtype. Raises as rms_norm.
    """
    both: tuple[Tensor, Tensor] = _run("add_rms_norm", h, update, residual_weight, norm_weight, eps)
    return both


def _run(
    op: str,
    h: Tensor,
    update: Tensor | None,
    residual_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> Any:
    """Check and compute h' and u, or h' alone without norm_weight; what `op` lacks is None."""
    _check(h, update, residual_weight, norm_weight)
    choice = _choose(op, h)
    new_h: Tensor = h
    if choice == "naive":
        if update is not None and residual_weight is not None:
            new_h = weighted_residual_naive(h, update, residual_weight).to(h.dtype)
        if norm_weight is None:
            return new_h
        return new_h, rms_norm_naive(new_h, norm_weight, eps).to(h.dtype)
    triton = choice == "triton"
    if is_dynamo_compiling():
        sum_, u = add_rms_norm_operator(h, update, residual_weight, norm_weight, eps, triton)
        new_h = h if update is None else sum_
        return new_h if norm_weight is None else (new_h, u)
    update = None if update is None else update.contiguous()
    return _AddNorm.apply(triton, h.contiguous(), update, residual_weight, norm_weight, eps)


class _AddNorm(torch.autograd.Function):
    """h' and u; without `update` h' is h, without `norm_weight` there is no u.

    h' of a residual is no view: Megatron-core frees the memory of a pipeline stage's output by
    itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        triton: bool,
        h: Tensor,
        update: Tensor | None,
        residual_weight: Tensor | None,
        norm_weight: Tensor | None,
        eps: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.implementation, ctx.eps = implementation_of(triton), eps
        ctx.set_materialize_grads(False)
        with launch_on(h):
            new_h, u = ctx.implementation.forward(h, update, residual_weight, norm_weight, eps)
        ctx.save_for_backward(
            None if update is None else h,
            None if norm_weight is None else new_h,
            residual_weight,
            norm_weight,
        )
        return new_h if u is None else (new_h, u)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_new_h: Tensor | None, d_u: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        h, new_h, residual_weight, norm_weight = ctx.saved_tensors
        # what an output's readers give; h' may have none beside the norm
        if norm_weight is None:
            d_new_h = torch.zeros_like(h) if d_new_h is None else d_new_h
        else:
            d_u = torch.zeros_like(new_h) if d_u is None else d_u.contiguous()
        if d_new_h is not None:
            d_new_h = d_new_h.contiguous()
        d_h, d_update, d_residual_weight, d_norm_weight = ctx.implementation.backward(
            d_new_h, d_u, h, new_h, residual_weight, norm_weight, ctx.eps
        )
        return None, d_h, d_update, d_residual_weight, d_norm_weight, None


def _choose(op: str, h: Tensor) -> Choice:
    unsupported = None
    if h.dtype == torch.float64:
        unsupported = "Triton kernels compute in float32, not float64"
    elif h.shape[-1] * h.element_size() > _MAX_ROW_BYTES:
        most = _MAX_ROW_BYTES // h.element_size()
        unsupported = f"N={h.shape[-1]}; a Triton program holds {most} channels of {h.dtype}"
    return choose(op, h.device, unsupported)


@once_per_shape
def _check(
    h: Tensor, update: Tensor | None, residual_weight: Tensor | None, norm_weight: Tensor | None
) -> None:
    """Raises as rms_norm says; what an operation lacks is None."""
    if h.ndim < 1 or h.shape[-1] == 0:
        raise ValueError(f"h has shape {tuple(h.shape)}; expected [..., N] with N at least 1")
    check_floating("h", h)
    if update is not None:
        check_tensor("update", update, h.shape, (h.dtype,), h.device)
    for name, weight in (("residual_weight", residual_weight), ("norm_weight", norm_weight)):
        if weight is not None:
            check_tensor(name, weight, h.shape[-1:], (h.dtype,), h.device)
