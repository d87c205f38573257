"""The rotation in PyTorch, for the CPU and as fallback: blocks of tokens that stay in cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: larger leaves the cache, smaller pays for calls


def rotate(
    tensors: Sequence[Tensor], out: Sequence[Tensor], cos: Tensor, sin: Tensor, conjugate: bool
) -> None:
    """Rotate each [B, L, H, D] by cos, sin [B, L, D/2] into `out`, which may be `tensors`.

    conjugate: by -sin instead of sin. Computed in float32 (float64 for float64).
    """
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    cos, sin = cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)  # [B, L, 1, D/2]
    both = torch.cat((cos, cos), dim=-1)  # [B, L, 1, D]
    sign = -1 if conjugate else 1
    for q, o in zip(tensors, out, strict=True):
        batch, length, heads, dim = q.shape
        half, tokens = dim // 2, max(1, BLOCK_ELEMENTS // max(1, heads * dim))
        if q.device.type != "cpu":  # there calls cost more than passes
            tokens = max(1, batch * length)
        time = max(1, min(length, tokens))
        rows = tokens // time
        scratch = q.new_empty(min(rows, batch), time, heads, dim, dtype=dtype)
        for b in range(0, batch, rows):
            for t in range(0, length, time):
                block = (slice(b, b + rows), slice(t, t + time))
                x = q[block].to(dtype)
                y = scratch[: x.shape[0], : x.shape[1]]
                torch.mul(x, both[block], out=y)
                y[..., :half].addcmul_(x[..., half:], sin[block], value=-sign)
                y[..., half:].addcmul_(x[..., :half], sin[block], value=sign)
                o[block] = y
