"""Step sizes, cumulative decays and document masks of the chunked scan: all that is [B, H, L].

    z_t = dt_t + dt_bias      Δ_t = softplus(z_t)      a_t = Δ_t A
    s_t = Σ a_r  over r ≤ t in t's chunk *and* document
    W_tj = exp(s_t - s_j + ln Δ_j)   for j ≤ t in the same chunk and document, else 0
    u_t  = exp(s_t)  if t's document began before the chunk, else 0

Sums restart at document starts, so no value of one document ever enters the rounding of another.
Masks are added to the exponent as -inf, never multiplied on afterwards: exp cannot overflow into
inf · 0. ln Δ rides in the exponent, which spares a pass over x.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Below this z, softplus(z) = exp(z) to float64 precision, and ln Δ = z even where Δ underflows.
_TINY_STEP = -36.0


class Decay(NamedTuple):
    z: Tensor  # [B, H, L]
    delta: Tensor  # [B, H, L]
    log_delta: Tensor  # [B, H, L]
    cumulative: Tensor  # s, [B, H, L]
    entry_gate: Tensor  # u, [B, H, L]
    segment: Tensor  # int64 [B, L]: equal exactly within one document of one chunk


def build_decay(
    dt: Tensor, dt_bias: Tensor, A: Tensor, cu_seqlens: Tensor, chunk: int, dtype: torch.dtype
) -> Decay:
    """From dt [B, L, H]; `dtype` is the accumulation type."""
    batch, length, _ = dt.shape
    z = (dt.to(dtype) + dt_bias.to(dtype)).transpose(1, 2).contiguous()  # [B, H, L]
    delta = softplus(z)
    log_delta = torch.where(z < _TINY_STEP, z, delta.log())

    token = torch.arange(batch * length, device=dt.device, dtype=cu_seqlens.dtype)
    document = torch.bucketize(token, cu_seqlens[1:], right=True).view(batch, length)
    time = torch.arange(length, device=dt.device)
    chunk_index = time // chunk
    segment = document * (length // chunk + 1) + chunk_index

    cumulative = segmented_cumsum(delta * A.to(dtype)[:, None], segment, chunk)
    # The last token before the chunk; the row's first token itself in the row's first chunk.
    before = document[:, (chunk_index * chunk - 1).clamp(min=0)]
    entered = (document == before).unsqueeze(1)  # [B, 1, L]
    entry_gate = torch.where(entered, cumulative.exp(), 0)
    return Decay(z, delta, log_delta, cumulative, entry_gate, segment)


def segmented_cumsum(values: Tensor, segment: Tensor, chunk: int) -> Tensor:
    """Inclusive running sum of [B, H, L] along L that restarts with each segment.

    Doubling: after step d each entry holds the sum of its last 2d values. Segments are contiguous
    and at most `chunk` long, so equal ids d apart mean that all between are equal too.
    """
    total, shift = values.clone(), 1
    while shift < min(chunk, values.shape[-1]):
        same = (segment[:, shift:] == segment[:, :-shift]).unsqueeze(1)
        total[..., shift:] += torch.where(same, total[..., :-shift], 0)
        shift *= 2
    return total


def decay_gradients(
    decay: Decay, A: Tensor, chunk: int, inflow: Tensor, outflow: Tensor, through: Tensor,
    grad_log_delta: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of z [B, H, L] and of A [H].

    `inflow_t` is the gradient of s_t from what reaches t inside its chunk; `outflow_j` that of j's
    way to the chunk's end; `through` [B, H, L] that of the state carried across t's whole chunk.
    a_t lies on every path from before t to t or after, hence the two running sums.
    """
    segment = decay.segment
    arriving = segmented_cumsum(inflow.flip(-1), segment.flip(-1), chunk).flip(-1)
    earlier = torch.zeros_like(outflow)
    same = (segment[:, 1:] == segment[:, :-1]).unsqueeze(1)
    earlier[..., 1:] = torch.where(same, outflow[..., :-1], 0)
    grad_a = arriving + segmented_cumsum(earlier, segment, chunk) + through  # [B, H, L]
    sigmoid = decay.z.sigmoid()
    # d ln Δ / dz = sigmoid / Δ tends to 1 where both underflow
    ratio = torch.where(decay.z < _TINY_STEP, 1, sigmoid / decay.delta)
    grad_z = grad_log_delta * ratio + grad_a * A.to(sigmoid.dtype)[:, None] * sigmoid
    return grad_z, (grad_a * decay.delta).sum((0, 2))
