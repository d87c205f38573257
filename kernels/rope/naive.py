"""Oracle of the rotation: float64, a pair as a complex number, plain autograd.

(o_k + i·o_{k+D/2}) = (q_k + i·q_{k+D/2}) · (cos_k + i·sin_k)        k = 0 .. D/2-1
"""

import torch
from torch import Tensor


def apply_rope_naive(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate q [B, L, H, D] by cos, sin [B, L, D/2]; float64 [B, L, H, D]."""
    pairs = torch.complex(*q.double().chunk(2, dim=-1))  # [B, L, H, D/2]
    rotated = pairs * torch.complex(cos.double(), sin.double()).unsqueeze(2)
    return torch.cat((rotated.real, rotated.imag), dim=-1)
