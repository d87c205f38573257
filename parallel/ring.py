"""Ring attention (arXiv 2310.01889), for head counts that context-parallel ranks cannot share out.

Every rank keeps its queries; keys and values go round the group, and each rank adds what its
queries read of the part that passes, under a running logarithm of the softmax's denominator.
Backward sends the parts round once more, their gradients with them.

In torch products, a tile of queries and keys at a time: no score outlives its tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TILE = 512  # queries and keys whose scores exist at a time


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention within documents over whole rows, of which each rank has a part.

    q [B, L / n, Hq, D], k, v [B, L / n, Hkv, D]; position_ids [B, L / n] since the document began.
    Returns [B, L / n, Hq, D] in q's dtype.
    """
    first = group.rank() * q.shape[1]
    index = torch.arange(first, first + q.shape[1], device=q.device)
    groups = k.shape[2]
    by_group = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, Hq/Hkv, L/n, D]
    keys, values = (t.transpose(1, 2) for t in (k, v))  # [B, Hkv, L/n, D]
    out: Tensor = _Ring.apply(by_group, keys, values, index - position_ids, group)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        out = torch.zeros_like(q, dtype=torch.float32)
        lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)
        passing = torch.stack((k, v))
        for step in range(group.size()):
            source = (group.rank() - step) % group.size()
            for tile, keys, scores in _tiles(q, passing[0], start, source, group.rank()):
                # a query's first tile has a key that it reads: itself
                total = torch.logaddexp(lse[..., tile], scores.logsumexp(-1))
                weights = torch.exp(scores - total.unsqueeze(-1))
                kept = torch.exp(lse[..., tile] - total).unsqueeze(-1)
                read = weights.to(v.dtype) @ passing[1, :, :, None, keys]
                out[..., tile, :] = out[..., tile, :] * kept + read
                lse[..., tile] = total
            if step + 1 < group.size():
                passing = _pass_on(passing, group)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, start, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, start, out, lse = ctx.saved_tensors
        d_out, group, scale = grads[0], ctx.group, q.shape[-1] ** -0.5
        delta = (d_out.float() * out.float()).sum(-1, keepdim=True)
        d_q = torch.zeros_like(q, dtype=torch.float32)
        passing = torch.stack((k, v))
        d_passing = torch.zeros_like(passing, dtype=torch.float32)
        for step in range(group.size()):
            source = (group.rank() - step) % group.size()
            for tile, keys, scores in _tiles(q, passing[0], start, source, group.rank()):
                k_tile, v_tile = passing[:, :, :, None, keys]  # [B, Hkv, 1, tile, D] each
                weights = torch.exp(scores - lse[..., tile].unsqueeze(-1))
                d_tile = d_out[..., tile, :]
                d_scores = (d_tile @ v_tile.transpose(-1, -2)).float() - delta[..., tile, :]
                d_scores = (weights * d_scores * scale).to(q.dtype)
                d_q[..., tile, :] += d_scores @ k_tile
                d_passing[0, ..., keys, :] += (d_scores.transpose(-1, -2) @ q[..., tile, :]).sum(2)
                d_passing[1, ..., keys, :] += (weights.to(q.dtype).transpose(-1, -2) @ d_tile).sum(
                    2
                )
            if step + 1 < group.size():
                passing = _pass_on(passing, group)
            d_passing = _pass_on(d_passing, group)  # after the last step they are home
        d_k, d_v = d_passing.to(k.dtype)
        return d_q.to(q.dtype), d_k, d_v, None, None


def _tiles(
    q: Tensor, k: Tensor, start: Tensor, source: int, rank: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of this rank's queries and of `source`'s keys, and their float32 scores
    [B, Hkv, Hq/Hkv, tile, tile]: -inf before a query's document and after the query.

    Of its own keys a query's tile meets those first that it ends with; later ones are not read, nor
    those of later ranks.
    """
    if source > rank:
        return
    length, scale = q.shape[-2], q.shape[-1] ** -0.5
    index = torch.arange(length, device=q.device)
    begins = range(0, length, TILE)
    for begin in begins:
        tile = slice(begin, min(begin + TILE, length))
        query = (index[tile] + rank * length)[:, None]
        for key_begin in reversed(begins):
            if source == rank and key_begin > begin:
                continue
            keys = slice(key_begin, min(key_begin + TILE, length))
            key = index[keys] + source * length
            reads = (key >= start[:, tile, None]) & (key <= query)  # [B, tile, tile]
            scores = (q[..., tile, :] @ k[:, :, None, keys].transpose(-1, -2)).float() * scale
            yield tile, keys, scores.masked_fill(~reads[:, None, None], -torch.inf)


def _pass_on(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """To the next rank of the group; what the one before had."""
    received = torch.empty_like(t)
    rank, size = group.rank(), group.size()
    following, before = (dist.get_global_rank(group, (rank + by) % size) for by in (1, -1))
    operations = [
        dist.P2POp(dist.isend, t.contiguous(), following, group),
        dist.P2POp(dist.irecv, received, before, group),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received
