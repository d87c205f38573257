"""SSD scan in PyTorch: chunks of Q tokens, matrix products inside, a recurrence between them.

Per head, W and u from `kernels.ssd.decay`, w = W's last row, S the state at a chunk's entry:

    y     = ((c bᵀ) ⊙ W) x + u ⊙ (c Sᵀ)  (+ D x)                  [Q, P]
    S_out = u_Q S + (w ⊙ x)ᵀ b                                     [P, N]

Backward saves the inputs and every S, nothing of size Q × Q. With dS the gradient of S_out:

    dG = (dy xᵀ) ⊙ W        E = dG ⊙ (c bᵀ)
    dx = ((c bᵀ) ⊙ W)ᵀ dy + w ⊙ (b dSᵀ)      db = dGᵀ c + (w ⊙ x) dS      dc = dG b + (u ⊙ dy) S
    dS_in = u_Q dS + (u ⊙ dy)ᵀ c

and the decays' gradients are row and column sums of E, which all but cancel and are therefore kept
in float64: in float32 their rounding is what would be left. Products run in x's dtype; exponents
and running states in float32 (float64 for float64); the saved S are in x's dtype.

Both passes are custom operators, which torch.compile calls as they are, forward and backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.slices import buffer_size, shared_stride, sliced
from kernels.ssd.blocks import Block, Buffers, heads_at_once
from kernels.ssd.decay import decay_gradients
from kernels.ssd.walk import Operands, Walk

CHUNK_SIZE = 64  # Q where the caller leaves it open, for every length and dtype


def ssd_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None, sin: Tensor | None,
    dt_bias: Tensor, cu_seqlens: Tensor, chunk_size: int, initial_state: Tensor | None,
    D: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, L, H, P] and the final state [B, H, P, N]; arguments as `kernels.ssd.ssd.ssd`."""
    chunk = chunk_size or CHUNK_SIZE
    inputs = (x, dt, A, B, C, dt_bias, initial_state, D)
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, final_state, _ = _forward(
        x, dt, A, B, C, cos, sin, dt_bias, cu_seqlens, initial_state, D, chunk, backward
    )
    return y, final_state


@torch.library.custom_op("transxssm::chunked_scan", mutates_args=())
def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None, sin: Tensor | None,
    dt_bias: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None, D: Tensor | None, chunk: int,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state and, where a `backward` will follow, S at every chunk border.

    S: [B, parts of a row, K + 1, h, P, N] in x's dtype, K + 1 = 0 without backward.
    """
    y, final_state, states = _outputs(x, B, chunk, backward)
    walk = Walk(x, dt, A, B, C, cos, sin, dt_bias, cu_seqlens, D, chunk, states.shape[3])
    if initial_state is None:
        final_state.zero_()
    else:
        final_state.copy_(initial_state)
    for part in walk.parts():
        out = y[part.row, :, part.heads]
        state = final_state[part.row, part.heads]
        saved = states[part.row, part.index] if backward else None
        for block in walk.blocks:
            at, buffers = walk.operands(part, block), walk.buffers(block)
            decayed = buffers.scaled("decayed", at.x, at.last)
            entries, state = _carry(buffers, block, at, decayed, state, saved)
            yh = buffers.product("y", at.c, entries.mT).mul_(at.gate)
            scores = buffers.product("scores", at.c, at.b.mT).mul_(at.w)
            if part.D is not None:  # D x is one more number on the diagonal
                buffers.diagonal(scores).add_(part.D)
            yh.baddbmm_(scores, at.x)
            block.per_token(out).copy_(buffers.by_head(yh))
        final_state[part.row, part.heads].copy_(state)
    return y, final_state, states


def _carry(
    buffers: Buffers, block: Block, at: Operands, decayed: Tensor, state: Tensor,
    saved: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S at the chunks' entries [n, P, N] in x's dtype, and at the block's end [h, P, N].

    saved [K + 1, h, P, N]: where the former are kept, if they are.
    """
    in_place = saved is not None and saved.dtype == state.dtype
    if saved is not None and in_place:
        running = saved[block.chunks.start : block.chunks.stop + 1]
    else:
        running = buffers.named("states", block.count + 1, *state.shape, dtype=state.dtype)
    borders = running.unbind(0)
    if not in_place or block.chunks.start == 0:
        borders[0].copy_(state)
    buffers.state_product(running[1:], decayed.mT, at.b)
    for i, factor in enumerate(at.carried[..., None, None].unbind(0)):
        borders[i + 1].addcmul_(borders[i], factor)
    entries = running[:-1]
    if saved is None:
        entries = buffers.low("entries", entries)
    elif not in_place:
        entries = saved[block.chunks].copy_(entries)
    return entries.flatten(0, 1), borders[block.count]


def _outputs(x: Tensor, B: Tensor, chunk: int, backward: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    together = heads_at_once(x, state_dim, groups, chunk)
    borders = -(-length // chunk) + 1 if backward else 0
    acc = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(batch, heads, head_dim, state_dim, dtype=acc),
        x.new_empty(batch, heads // together, borders, together, head_dim, state_dim),
    )


@_forward.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, args[2], args[-2], args[-1])


class _Sums(NamedTuple):
    """What the decays' gradients are made of, each [..., h, Q]."""

    received: Tensor  # over a row of E, the diagonal left out: from earlier tokens of the chunk
    sent: Tensor  # over a column of E: to later ones
    own: Tensor  # E's diagonal, which has no decay in it
    arrived: Tensor  # from the chunk's entry state
    left: Tensor  # to its exit state
    skipped: Tensor  # dy · x, D's gradient


@torch.library.custom_op("transxssm::chunked_scan_backward", mutates_args=())
def _backward(
    dy: Tensor | None, d_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
    C: Tensor, cos: Tensor | None, sin: Tensor | None, dt_bias: Tensor, cu_seqlens: Tensor,
    D: Tensor | None, states: Tensor, chunk: int, stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, B and C in one buffer, then of dt, A, dt_bias, the initial state and D.

    stride: that of the buffer (`kernels.slices`), where dt is a slice of it too; D's gradient is
    empty without D.
    """
    walk = Walk(x, dt, A, B, C, cos, sin, dt_bias, cu_seqlens, D, chunk, states.shape[3])
    shapes = _slices(x, B, C, dt, stride)
    buffer, d_initial = _token_gradients(x, B, shapes, stride)
    dx, dB, dC = sliced(buffer, shapes, stride)[:3]
    if d_final is None:
        d_initial.zero_()
    else:
        d_initial.copy_(d_final)
    dy = torch.zeros_like(x) if dy is None else dy
    # [B, parts, K, 6, h, Q]
    batch, parts, chunks, heads, q = walk.decay.z.shape
    sums_shape = batch, parts, chunks, len(_Sums._fields), heads, q
    all_sums = walk.decay.z.new_zeros(sums_shape, dtype=torch.float64)
    through = torch.zeros_like(walk.decay.z[..., 0])  # [B, parts, K, h]
    for part in walk.parts():
        dys, dxs = (t[part.row, :, part.heads] for t in (dy, dx))
        dBs, dCs = (t[part.row, :, part.groups] for t in (dB, dC))
        d_state = d_initial[part.row, part.heads]
        part_sums = all_sums[part.row, part.index]
        for block in reversed(walk.blocks):
            at, buffers = walk.operands(part, block), walk.buffers(block)
            sums = _Sums(*part_sums[block.chunks, ..., : block.size].unbind(1))
            dyh = buffers.load("dy", block.per_token(dys))

            # between chunks
            gated = buffers.scaled("gated", dyh, at.gate)
            d_exits, d_state = _carry_back(buffers, block, at, gated, d_state)
            entries = states[part.row, part.index, block.chunks].flatten(0, 1)
            crossing = buffers.scaled("crossing", entries, d_exits).sum((-2, -1), dtype=walk.acc)
            crossing = crossing.view(at.carried.shape)
            torch.mul(crossing, at.carried, out=through[part.row, part.index, block.chunks])
            d_rotated = buffers.named("d_rotated", 2, *at.b.shape)
            db, dc = d_rotated.unbind(0)
            torch.bmm(gated, entries, out=dc)
            buffers.dots(dc, at.c, sums.arrived)
            decayed = buffers.scaled("decayed", at.x, at.last)
            torch.bmm(decayed, d_exits, out=db)
            buffers.dots(db, at.b, sums.left)
            dxh = buffers.product("dx", at.b, d_exits.mT).mul_(at.last)

            # inside a chunk
            scores = buffers.product("scores", at.c, at.b.mT).mul_(at.w)
            dw = buffers.product("dw", dyh, at.x.mT)
            # rows and columns must cancel: they are sums of the same numbers, in float64
            e = buffers.exact("e", buffers.scaled("e", dw, scores))
            sums.own.copy_(buffers.diagonal(e))
            buffers.diagonal(e).zero_()
            torch.sum(buffers.by_head(e), -1, dtype=torch.float64, out=sums.received)
            torch.sum(buffers.by_head(e), -2, dtype=torch.float64, out=sums.sent)
            if part.D is not None:
                sums.skipped.copy_(buffers.diagonal(dw))
                buffers.diagonal(scores).add_(part.D)
            dg = dw.mul_(at.w)
            dc.baddbmm_(dg, at.b)
            db.baddbmm_(dg.mT, at.c)
            dxh.baddbmm_(scores.mT, dyh)
            block.per_token(dxs).copy_(buffers.by_head(dxh))
            tokens = block.tokens
            buffers.rotate_out(d_rotated, dBs[tokens], dCs[tokens], at.tables, block)
        d_initial[part.row, part.heads].copy_(d_state)
    received, sent, own, arrived, left, skipped = all_sums.unbind(3)
    dz, dA = decay_gradients(
        walk.decay, A, x.shape[1], received - sent + arrived, left, through.unsqueeze(-1),
        sent + own + left,
    )  # fmt: skip
    dD = x.new_empty(0) if D is None else skipped.sum((0, 2, 4)).flatten().to(D.dtype)
    d_bias = dz.sum((0, 1)).to(dt_bias.dtype)
    return buffer, dz.to(dt.dtype), dA.to(A.dtype), d_bias, d_initial, dD


def _carry_back(
    buffers: Buffers, block: Block, at: Operands, gated: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor]:
    """dS at the chunks' exits [n, P, N] in x's dtype, and at the block's entry [h, P, N]."""
    running = buffers.named("states", block.count + 1, *d_state.shape, dtype=d_state.dtype)
    borders = running.unbind(0)
    borders[block.count].copy_(d_state)
    buffers.state_product(running[:-1], gated.mT, at.c)
    factors = at.carried[..., None, None].unbind(0)
    for i in reversed(range(block.count)):
        borders[i].addcmul_(borders[i + 1], factors[i])
    return buffers.low("d_exits", running[1:]).flatten(0, 1), borders[0]


def _slices(x: Tensor, B: Tensor, C: Tensor, dt: Tensor, stride: int) -> list[torch.Size]:
    """Shapes of what lies in the buffer of gradients."""
    return [t.shape for t in ((x, B, C, dt) if stride else (x, B, C))]


def _token_gradients(
    x: Tensor, B: Tensor, shapes: list[torch.Size], stride: int
) -> tuple[Tensor, Tensor]:
    """The buffer of gradients and that of the initial state, to be written."""
    acc = torch.promote_types(x.dtype, torch.float32)
    d_initial = x.new_empty(x.shape[0], *x.shape[2:], B.shape[-1], dtype=acc)
    return x.new_empty(buffer_size(shapes, stride)), d_initial


@_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    _, _, x, dt, A, B, C, _, _, dt_bias, _, D, _, _, stride = args
    buffer, d_initial = _token_gradients(x, B, _slices(x, B, C, dt, stride), stride)
    d_dt, dA, d_bias = (t.new_empty(t.shape) for t in (dt, A, dt_bias))
    dD = x.new_empty(0) if D is None else D.new_empty(D.shape)
    return buffer, d_dt, dA, d_bias, d_initial, dD


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_state, D, chunk, _ = inputs
    ctx.save_for_backward(*tensors, D, output[2])
    ctx.chunk, ctx.has_initial_state, ctx.has_D = chunk, initial_state is not None, D is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    x, dt, _, B, C, *_ = saved
    stride = shared_stride((x, B, C, dt))
    buffer, d_dt, dA, d_bias, d_initial, dD = _backward(dy, d_final, *saved, ctx.chunk, stride)
    dx, dB, dC, *rest = sliced(buffer, _slices(x, B, C, dt, stride), stride)
    if rest:  # an operator's results may not share memory, so the last columns are filled here
        d_dt = rest[0].copy_(d_dt)
    return (
        dx, d_dt, dA, dB, dC, None, None, d_bias, None,
        d_initial if ctx.has_initial_state else None, dD if ctx.has_D else None, None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_setup_context)
