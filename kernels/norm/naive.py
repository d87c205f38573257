"""Oracle of the norm and the weighted residual: their formulas in float64, plain autograd."""

import torch
from torch import Tensor


def rms_norm_naive(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h / sqrt(mean(h²) + eps) ⊙ weight; h [..., N], weight [N]; float64 [..., N]."""
    h = h.double()
    return h / torch.sqrt((h * h).mean(dim=-1, keepdim=True) + eps) * weight.double()


def weighted_residual_naive(h: Tensor, update: Tensor, weight: Tensor) -> Tensor:
    """weight ⊙ h + update; h, update [..., N], weight [N]; float64 [..., N]."""
    return weight.double() * h.double() + update.double()
