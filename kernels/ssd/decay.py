"""Step sizes and cumulative decays of the chunked scan: all that is one number a token and head.

    z_t = dt_t + dt_bias      Δ_t = softplus(z_t)      a_t = Δ_t A log2(e), a power of two
    s_t = Σ a_r  over r ≤ t in t's chunk
    W_tj = exp2(s_t - s_j + log2 Δ_j)   for j ≤ t in the same chunk and document, else 0
    u_t  = exp2(s_t)  if t's document began before the chunk, else 0

Base 2, because exp2 is the fastest exponential there is. log2 Δ rides in the exponent, which spares
a pass over x.

A document's first token is a step of -`forget`, whose exp2 is 0: nothing of an earlier document
passes it, without a mask of its own. Steps below -forget are cut there; exp2 cannot tell.

s_t - s_j cancels: where s is in the thousands, float32 would leave 1e-4 of the difference. So each
step is split, a = a_hi + a_lo: a_hi on a grid so coarse that every sum over a chunk is exact in
float32, a_lo the small rest, its sums restarted at document starts. The exponent is then
(hi_t - hi_j) + (lo_t + log2 Δ_j - lo_j), and no value of one document enters another's rounding.
"""

from math import e, log2
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

_LOG2_E = log2(e)
# Below this z, softplus(z) = exp(z) to float64 precision, and ln Δ = z even where Δ underflows.
_TINY_STEP = -36.0


class Decay(NamedTuple):
    """[B, S, K, h, Q]: S groups of h heads, K chunks of Q tokens, the last filled up with zeros."""

    z: Tensor
    delta: Tensor
    hi: Tensor
    lo: Tensor
    sent: Tensor  # log2 Δ - lo
    gate: Tensor  # u
    start: Tensor  # bool [B, 1, K, 1, Q]: a document starts here (not at a row's first token)
    document: Tensor  # int64 [B, 1, K, 1, Q], numbered within each chunk

    def part(self, row: int, index: int) -> "Decay":
        """[K, h, Q] of one row and group of heads"""
        return Decay(*(t[row, min(index, t.shape[1] - 1)] for t in self))


def build_decay(
    dt: Tensor, dt_bias: Tensor, A: Tensor, cu_seqlens: Tensor, chunk: int, heads: int,
    dtype: torch.dtype,
) -> Decay:  # fmt: skip
    """From dt [B, L, H]; `heads` is h, `dtype` the accumulation type."""
    start = _document_starts(dt, cu_seqlens, chunk)
    z = in_chunks(dt.to(dtype) + dt_bias.to(dtype), chunk, heads)
    delta = softplus(z)
    log2_delta = torch.where(z < _TINY_STEP, z * _LOG2_E, delta.log2())

    info = torch.finfo(dtype)
    forget = 4 * round(log2(info.max))  # 512, or 4,096 for float64: 0 even times the largest Δ
    grid = info.eps * forget * chunk
    a = (delta * per_head(A.to(dtype) * _LOG2_E, heads)).clamp(min=-forget)
    a = torch.where(start, -forget, a)
    a_hi = torch.round(a / grid) * grid
    document = start.cumsum(-1)
    hi, lo = a_hi.cumsum(-1), segmented_cumsum(a - a_hi, document)
    return Decay(z, delta, hi, lo, log2_delta - lo, torch.exp2(hi + lo), start, document)


def _document_starts(dt: Tensor, cu_seqlens: Tensor, chunk: int) -> Tensor:
    batch, length = dt.shape[:2]
    starts = torch.zeros(batch * length + 1, dtype=torch.bool, device=dt.device)
    starts.index_fill_(0, cu_seqlens.long(), True)
    starts = starts[:-1].view(batch, length, 1)
    starts[:, 0] = False
    return in_chunks(starts, chunk, 1)


def in_chunks(t: Tensor, chunk: int, heads: int) -> Tensor:
    """[B, L, H] → [B, S, K, h, Q]"""
    t = pad(t, (0, 0, 0, -t.shape[1] % chunk))
    t = t.unflatten(1, (-1, chunk)).unflatten(3, (-1, heads))  # [B, K, Q, S, h]
    return t.permute(0, 3, 1, 4, 2).contiguous()


def in_tokens(t: Tensor, length: int) -> Tensor:
    """[B, S, K, h, Q] → [B, L, H]"""
    return t.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)[:, :length].contiguous()


def per_head(t: Tensor, heads: int) -> Tensor:
    """[H] → [S, 1, h, 1]"""
    return t.view(-1, 1, heads, 1)


def segmented_cumsum(values: Tensor, segment: Tensor) -> Tensor:
    """Inclusive running sum along the last dimension that restarts where `segment` changes.

    Doubling: after step d each entry holds the sum of its last 2d values. Segments are contiguous,
    so equal ids d apart mean that all between are equal too.
    """
    total, shift = values.clone(), 1
    while shift < values.shape[-1]:
        same = segment[..., shift:] == segment[..., :-shift]
        total[..., shift:] += torch.where(same, total[..., :-shift], 0)
        shift *= 2
    return total


def decay_gradients(
    decay: Decay, A: Tensor, length: int, inflow: Tensor, outflow: Tensor, through: Tensor,
    grad_log_delta: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of z [B, L, H] and of A [H], from [B, S, K, h, Q].

    `inflow_t` is the gradient of s_t from what reaches t inside its chunk; `outflow_j` that of j's
    way to the chunk's end; `through` [B, S, K, h, 1] that of the state carried across the chunk.
    a_t lies on every path from before t to t or after, hence the two running sums.
    """
    document = decay.document
    arriving = segmented_cumsum(inflow.flip(-1), document.flip(-1)).flip(-1)
    earlier = torch.zeros_like(outflow)
    same = document[..., 1:] == document[..., :-1]
    earlier[..., 1:] = torch.where(same, outflow[..., :-1], 0)
    grad_a = arriving + segmented_cumsum(earlier, document) + through
    grad_a = torch.where(decay.start, 0, grad_a)
    sigmoid = decay.z.sigmoid()
    # d ln Δ / dz = sigmoid / Δ tends to 1 where both underflow
    ratio = torch.where(decay.z < _TINY_STEP, 1, sigmoid / decay.delta)
    heads = decay.z.shape[3]
    grad_z = grad_log_delta * ratio + grad_a * per_head(A.to(sigmoid.dtype), heads) * sigmoid
    grad_A = in_tokens(grad_a * decay.delta, length).sum((0, 1))
    return in_tokens(grad_z, length), grad_A
