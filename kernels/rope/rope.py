"""Rotary position embedding of queries and keys, rotate-half (NeoX) pairing.

    o_k       = q_k · cos_k - q_{k+D/2} · sin_k
    o_{k+D/2} = q_{k+D/2} · cos_k + q_k · sin_k              k = 0 .. D/2-1

The gradient is the transposed map, the same rotation by -sin, so backward needs cos and sin alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def apply_rope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate q by its positions' angles; computed in float32, returned in q's dtype.

    q:        [B, L, H, D], any floating dtype (float64 is computed in float64)
    cos, sin: float32 [B, L, D/2], from `kernels.rope.table.rotary_cos_sin`

    Raises ValueError when shapes disagree, TypeError when q is not floating point.
    """
    if q.ndim != 4 or q.shape[-1] % 2:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, L, H, D] with D even")
    if not q.is_floating_point():
        raise TypeError(f"q has dtype {q.dtype}; expected a floating-point dtype")
    expected = (q.shape[0], q.shape[1], q.shape[3] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != expected:
            raise ValueError(f"{name} has shape {tuple(table.shape)}; expected {expected}")
    rotated: Tensor = _Rope.apply(q, cos, sin)
    return rotated


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _implementation(q.device)(q, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _implementation(grad.device)(grad, cos, -sin), None, None


def _implementation(device: torch.device) -> Rotate:
    """The rotation for a device; every device runs the torch one."""
    return _rotate_torch


def _rotate_torch(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)  # [B, L, 1, D/2]
    first, second = q.to(dtype).chunk(2, dim=-1)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(q.dtype)
