"""Context parallelism: every rank of a group holds a contiguous part of each row's tokens.

Attention exchanges tokens for heads (all-to-all; DeepSpeed-Ulysses, arXiv 2309.14509): whole rows
of some of the heads; where the heads cannot be shared out, a ring (`parallel.ring`). The SSD scan
stays where its tokens are and passes states, which are as large for a long row as for a short one:
each rank scans its part from a zero state, the ranks exchange total decays T and final states F in
float32, and the state that enters rank c is

    I_c = T_{c-1} I_{c-1} + F_{c-1},   I_0 = 0

of which every token t of a document that began on an earlier rank reads exp(Σ_{j≤t} Δ_j A) I_c c_t,
the sum running from the rank's first token.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from kernels.attention import attention
from kernels.rope.rope import apply_rope
from parallel.layers import recomputed
from parallel.ring import ring_attention
from parallel.sizes import heads_are_shared_out
from parallel.sums import PackedBatch


@dataclass(frozen=True)
class LocalBatch:
    """A context-parallel rank's part of a batch.

    tokens, labels int64, position_ids int32, loss_mask float32, all [B, L / context]; position_ids
    go on counting from the document's first token, wherever that is. cu_seqlens: int32 borders of
    whole rows over B·L tokens; local_cu_seqlens: of the parts, over B·L / context tokens. sources:
    int64 [B], which of the run's sources a row is of.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    local_cu_seqlens: Tensor
    sources: Tensor


def local_batch(batch: PackedBatch, device: torch.device) -> LocalBatch:
    """This rank's part of a batch on the host, on `device`."""
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    length = batch.tokens.shape[1]
    part = slice(rank * length // size, (rank + 1) * length // size)
    fields = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
    borders = local_borders(batch.cu_seqlens, batch.tokens.shape[0], length, part)
    parts = [field[:, part].contiguous() for field in fields]
    parts += [batch.cu_seqlens, borders, batch.sources]
    return LocalBatch(*(t.to(device, non_blocking=True) for t in parts))


def local_borders(cu_seqlens: Tensor, rows: int, length: int, part: slice) -> Tensor:
    """Borders int32 over the rows' parts laid end to end, where every row's part begins one."""
    size = part.stop - part.start
    row, token = cu_seqlens[:-1] // length, cu_seqlens[:-1] % length
    inside = (token > part.start) & (token < part.stop)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=cu_seqlens.device) * size
    borders = row[inside] * size + token[inside] - part.start
    return torch.cat((starts, borders.int())).sort().values


def context_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, position_ids: Tensor
) -> Tensor:
    """Causal attention over whole rows; q [B, L / context, Hq, D], k, v [B, L / context, Hkv, D].

    cu_seqlens: borders of whole rows; position_ids [B, L / context]. Exchanges heads where the
    context-parallel size n divides Hq, and divides Hkv or is a multiple of it (ranks that share a
    key head each get it); else keys and values go round a ring.
    """
    group = parallel_state.get_context_parallel_group()
    size, kv_heads = group.size(), k.shape[2]
    if not heads_are_shared_out(q.shape[2], kv_heads, size):
        return ring_attention(q, k, v, position_ids, group)
    if kv_heads < size:
        k, v = (t.repeat_interleave(size // kv_heads, dim=2) for t in (k, v))
    q, k, v = (_tokens_for_heads(t, group) for t in (q, k, v))
    return _heads_for_tokens(attention(q, k, v, cu_seqlens), group)


def _tokens_for_heads(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L / n, H, D] of every rank → [B, L, H / n, D]."""
    by_owner = t.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4)  # [n, B, L/n, H/n, D]
    return all_to_all(group, by_owner).transpose(0, 1).flatten(1, 2)


def _heads_for_tokens(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, H / n, D] of every rank → [B, L / n, H, D]."""
    by_owner = t.unflatten(1, (group.size(), -1)).transpose(0, 1)  # [n, B, L/n, H/n, D]
    return all_to_all(group, by_owner).permute(1, 2, 0, 3, 4).flatten(2, 3)


def add_earlier_ranks(
    y: Tensor, final_state: Tensor, dt: Tensor, A: Tensor, C: Tensor, cos: Tensor | None,
    sin: Tensor | None, dt_bias: Tensor, position_ids: Tensor,
) -> Tensor:  # fmt: skip
    """y [B, L, H, P] of a scan of this rank's tokens from a zero state → y of the whole rows' scan.

    final_state [B, H, P, N] float32 is that scan's; the rest are its inputs (`kernels.ssd.ssd`) and
    position_ids [B, L]. Sends B·H·(P·N + 1) float32 numbers, whatever the length.
    """
    group = parallel_state.get_context_parallel_group()
    token = torch.arange(y.shape[1], device=y.device)
    entered = position_ids > token  # [B, L]: the document began on an earlier rank
    total = torch.exp(_step_sizes(dt, dt_bias).sum(1) * A)  # [B, H]
    total = torch.where(entered[:, -1:], total, 0.0)
    message = torch.cat((total.unsqueeze(-1), final_state.flatten(2)), dim=-1)
    messages = gather_from_sequence_parallel_region(message.unsqueeze(0), group=group)
    # every rank goes through all of them: the sum of gradients is a collective too
    states = [torch.zeros_like(final_state)]
    for decay_across, added in zip(messages[:-1, ..., :1], messages[:-1, ..., 1:], strict=True):
        earlier = states[-1].flatten(2) * decay_across + added
        states.append(earlier.view_as(final_state))
    state = torch.stack(states)[group.rank()]
    return y + recomputed(_read_state, state, dt, A, C, cos, sin, dt_bias, entered)


def _step_sizes(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """Δ, float32 [B, L, H]."""
    return F.softplus(dt.float() + dt_bias.float())


def _read_state(
    state: Tensor, dt: Tensor, A: Tensor, C: Tensor, cos: Tensor | None, sin: Tensor | None,
    dt_bias: Tensor, entered: Tensor,
) -> Tensor:  # fmt: skip
    """What tokens read of a state [B, H, P, N] that entered: [B, L, H, P] in C's dtype."""
    batch, heads, head_dim, _ = state.shape
    groups = C.shape[2]
    c = C if cos is None or sin is None else apply_rope(C, cos, sin)
    by_group = state.to(c.dtype).view(batch, groups, heads // groups * head_dim, -1)
    read = c.transpose(1, 2) @ by_group.transpose(2, 3)  # [B, G, L, H/G · P]
    read = read.transpose(1, 2).unflatten(3, (-1, head_dim)).flatten(2, 3)  # [B, L, H, P]
    decay = torch.exp(_step_sizes(dt, dt_bias).cumsum(1) * A)  # [B, L, H]
    gate = torch.where(entered.unsqueeze(-1), decay, 0.0)
    return (read * gate.unsqueeze(-1)).to(c.dtype)
