"""Oracle of the rotation: float64, one token and one pair at a time.

(o_k + i·o_{k+D/2}) = (q_k + i·q_{k+D/2}) · (cos_k + i·sin_k)        k = 0 .. D/2-1
"""

import torch
from torch import Tensor


def apply_rope_naive(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate q [B, L, H, D] by cos, sin [B, L, D/2]; float64 [B, L, H, D]."""
    batch, length, heads, dim = q.shape
    q, turn = q.double(), torch.complex(cos.double(), sin.double())
    out = torch.empty(batch, length, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            for k in range(dim // 2):
                pair = torch.complex(q[b, t, :, k], q[b, t, :, k + dim // 2])  # [H]
                rotated = pair * turn[b, t, k]
                out[b, t, :, k] = rotated.real
                out[b, t, :, k + dim // 2] = rotated.imag
    return out
