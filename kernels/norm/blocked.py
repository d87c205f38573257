"""RMSNorm and weighted residual in PyTorch, for the CPU and as fallback.

Rows are taken in blocks that stay in cache, so that the many passes of which a norm consists read
and write memory once. All tensors [..., N], contiguous; formulas in `kernels.norm.norm`.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: larger leaves the cache, smaller pays for calls


def forward(
    h: Tensor,
    update: Tensor | None,
    residual_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """h' (h itself without update) and u (None without norm_weight)."""
    exact = torch.promote_types(h.dtype, torch.float32)
    new_h = h if update is None else torch.empty_like(h)
    u = None if norm_weight is None else torch.empty_like(h)
    for h_, update_, new_, u_ in _blocks(h, update, new_h, u):
        if residual_weight is not None:
            torch.addcmul(update_, residual_weight, h_, out=new_)
        if norm_weight is not None:
            x = new_.to(exact)
            y = u_ if u_.dtype == exact else x
            torch.mul(x, _inverse_rms(x, eps), out=y).mul_(norm_weight.to(exact))
            if y is x:
                u_.copy_(x)
    return new_h, u


def backward(
    d_new_h: Tensor | None,
    d_u: Tensor | None,
    h: Tensor | None,
    new_h: Tensor | None,
    residual_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of h, update, residual_weight and norm_weight; None for what forward lacked.

    d_new_h: None where nobody else reads h'; d_u: None where forward had no norm.
    """
    given = d_new_h if d_u is None else d_u
    assert given is not None
    exact = torch.promote_types(given.dtype, torch.float32)
    d_h = torch.empty_like(given)
    d_update = None
    if residual_weight is not None:
        d_update = d_new_h if d_u is None else torch.empty_like(given)
    d_residual = torch.zeros(given.shape[-1], dtype=exact, device=given.device)
    d_norm = torch.zeros_like(d_residual)
    blocks = _blocks(d_new_h, d_u, h, new_h, d_h, d_update)
    for d_new_, d_u_, h_, new_, d_h_, d_update_ in blocks:
        if norm_weight is None:
            total = d_new_.to(exact)
        else:
            total = _norm_backward(d_u_, new_, norm_weight.to(exact), eps, d_norm)
            if d_new_ is not None:
                total.add_(d_new_)
            if residual_weight is not None:
                d_update_.copy_(total)
        if residual_weight is None:
            d_h_.copy_(total)
        else:
            d_residual += h_.to(exact).mul(total).sum(0)
            d_h_.copy_(total.mul(residual_weight.to(exact)))
    return (
        d_h,
        d_update,
        None if residual_weight is None else d_residual.to(residual_weight.dtype),
        None if norm_weight is None else d_norm.to(norm_weight.dtype),
    )


def _norm_backward(
    d_u: Tensor, new_h: Tensor, weight: Tensor, eps: float, d_weight: Tensor
) -> Tensor:
    """The gradient of h' [rows, N] through the norm alone, in weight's dtype; adds to d_weight."""
    x, g = new_h.to(weight.dtype), d_u.to(weight.dtype)
    scale = _inverse_rms(x, eps)  # [rows, 1]
    product = x * g
    along = (product @ weight).unsqueeze(1) * scale**3 / x.shape[1]  # [rows, 1]
    d_weight += product.mul_(scale).sum(0)
    return torch.mul(g, weight, out=product).mul_(scale).addcmul_(x, along, value=-1)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1/sqrt(mean(x²) + eps) of each row, [rows, 1]."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()


def _blocks(*tensors: Tensor | None) -> list[tuple[Any, ...]]:
    """The same rows of every tensor, as [rows, N]; a missing one is missing in every block."""
    first = next(t for t in tensors if t is not None)
    channels = first.shape[-1]
    # off the CPU all at once: there calls cost more than passes
    step = max(1, BLOCK_ELEMENTS // channels if first.device.type == "cpu" else first.numel())
    count = len(first.view(-1, channels).split(step))
    blocks = [[None] * count if t is None else t.view(-1, channels).split(step) for t in tensors]
    return list(zip(*blocks, strict=True))
