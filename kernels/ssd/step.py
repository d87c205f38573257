"""One token of the SSD recurrence, for decoding.

Δ = softplus(dt + dt_bias)      b, c = RoPE(B), RoPE(C)
S' = exp(Δ A) S + Δ x bᵀ        y = S' c  (+ D x)
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.rope.rope import apply_rope


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cos: Tensor | None,
    sin: Tensor | None,
    dt_bias: Tensor,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, H, P] in x's dtype and the new state [B, H, P, N] in the state's, float32.

    state [B, H, P, N] float32, x [B, H, P], dt [B, H], A, dt_bias, D [H], B, C [B, G, N],
    cos, sin [B, N/2] of the token's position (None: no rotation). `state` is left as it is.

    Raises ValueError when the state's shape does not fit x and B.
    """
    expected = (*x.shape, B.shape[-1])
    if tuple(state.shape) != expected or B.shape != C.shape:
        raise ValueError(
            f"state has shape {tuple(state.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)};"
            f" expected state {expected} for x {tuple(x.shape)}, and B and C alike"
        )
    dtype, heads = state.dtype, x.shape[1]
    delta = softplus(dt.to(dtype) + dt_bias.to(dtype))  # [B, H]
    b, c = (_rotated(t.to(dtype), heads, cos, sin) for t in (B, C))  # [B, H, N]
    exact_x = x.to(dtype)
    write = (delta[..., None] * exact_x).unsqueeze(-1) * b.unsqueeze(-2)  # [B, H, P, N]
    new_state = torch.exp(delta * A.to(dtype))[..., None, None] * state + write
    y = torch.einsum("bhpn,bhn->bhp", new_state, c)
    if D is not None:
        y = y + D.to(dtype)[:, None] * exact_x
    return y.to(x.dtype), new_state


def _rotated(b: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is not None and sin is not None:
        b = apply_rope(b.unsqueeze(1), cos.unsqueeze(1), sin.unsqueeze(1)).squeeze(1)
    return b.repeat_interleave(heads // b.shape[1], dim=1)
