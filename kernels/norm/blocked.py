"""RMSNorm and weighted residual in PyTorch, for the CPU and as fallback.

Rows are taken in blocks that stay in cache, so that the many passes of which a norm consists read
and write memory once. All on rows [T, N], contiguous; formulas in `kernels.norm.norm`.
"""

from collections.abc import Iterator

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
    """h' [T, N] (h itself without update) and u [T, N] (None without norm_weight)."""
    exact = torch.promote_types(h.dtype, torch.float32)
    new_h = h if update is None else torch.empty_like(h)
    u = None if norm_weight is None else torch.empty_like(h)
    for rows in _blocks(h):
        if update is not None and residual_weight is not None:
            torch.addcmul(update[rows], residual_weight, h[rows], out=new_h[rows])
        if u is not None and norm_weight is not None:
            x = new_h[rows].to(exact)
            y = u[rows] if u.dtype == exact else x
            torch.mul(x, _inverse_rms(x, eps), out=y).mul_(norm_weight.to(exact))
            if y is x:
                u[rows] = x
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
    """Gradients of h, update, residual_weight and norm_weight; None for what forward lacked."""
    given = d_new_h if d_u is None else d_u
    assert given is not None
    exact = torch.promote_types(given.dtype, torch.float32)
    d_h = torch.empty_like(given)
    d_update = d_new_h if d_u is None or d_new_h is None else torch.empty_like(given)
    d_residual = torch.zeros(given.shape[1], dtype=exact, device=given.device)
    d_norm = torch.zeros_like(d_residual)
    for rows in _blocks(given):
        if d_u is None or new_h is None or norm_weight is None:
            assert d_new_h is not None
            total = d_new_h[rows].to(exact)
        else:
            total = _norm_backward(d_u[rows], new_h[rows], norm_weight.to(exact), eps, d_norm)
            if d_new_h is not None and d_update is not None:
                d_update[rows] = total.add_(d_new_h[rows])
        if h is None or residual_weight is None:
            d_h[rows] = total
        else:
            d_residual += (total * h[rows]).sum(0)
            d_h[rows] = total * residual_weight
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


def _blocks(h: Tensor) -> Iterator[slice]:
    """Slices of rows; off the CPU all at once, since there calls cost more than passes."""
    step = max(1, BLOCK_ELEMENTS // h.shape[1] if h.device.type == "cpu" else h.shape[0])
    return (slice(start, start + step) for start in range(0, h.shape[0], step))
