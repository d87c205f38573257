"""Oracle of the SSD scan: the recurrence itself, float64, one token at a time, plain autograd.

Δ_t = softplus(dt_t + dt_bias)      b, c = RoPE(B), RoPE(C)
S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t b_tᵀ        S = 0 before a document's first token
y_t = S_t c_t  (+ D x_t)
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def ssd_naive(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cos: Tensor | None,
    sin: Tensor | None,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int = 0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    D: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.ssd.ssd.ssd`, in float64 throughout; `chunk_size` has no meaning here."""
    batch, length, heads, head_dim = x.shape
    x = x.double()
    delta = softplus(dt.double() + dt_bias.double())  # [B, L, H]
    b = _per_head(_rotate(B.double(), cos, sin), heads)  # [B, L, H, N]
    c = _per_head(_rotate(C.double(), cos, sin), heads)
    starts = set(cu_seqlens.tolist())

    rows, finals = [], []
    for row in range(batch):
        state = x.new_zeros(heads, head_dim, B.shape[-1])  # [H, P, N]
        outputs = []
        for t in range(length):
            if t == 0 and initial_state is not None:
                state = initial_state[row].double()
            elif t > 0 and row * length + t in starts:
                state = torch.zeros_like(state)
            step = delta[row, t]  # [H]
            decay = torch.exp(step * A.double())
            write = torch.einsum("h,hp,hn->hpn", step, x[row, t], b[row, t])
            state = decay[:, None, None] * state + write
            y = torch.einsum("hpn,hn->hp", state, c[row, t])
            outputs.append(y if D is None else y + D.double()[:, None] * x[row, t])
        rows.append(torch.stack(outputs))
        finals.append(state)
    y = torch.stack(rows)  # [B, L, H, P]
    return (y, torch.stack(finals)) if output_final_state else y


def _rotate(b: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return b
    pairs = torch.complex(*b.chunk(2, dim=-1))  # [B, L, G, N/2]
    pairs = pairs * torch.complex(cos.double(), sin.double()).unsqueeze(2)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def _per_head(b: Tensor, heads: int) -> Tensor:
    """[B, L, G, N] → [B, L, H, N]: head h reads group h // (H/G)."""
    return b.repeat_interleave(heads // b.shape[2], dim=2)
