"""SSD scan in PyTorch: chunks of Q tokens, matrix products inside, a recurrence between them.

Per head, W and u from `kernels.ssd.decay`, w = W's last row, S the state at a chunk's entry:

    y     = ((c bᵀ) ⊙ W) x + u ⊙ (c Sᵀ)  (+ D x)                  [Q, P]
    S_out = u_Q S + (w ⊙ x)ᵀ b                                     [P, N]

Backward saves the inputs and every S, nothing of size Q × Q. With dS the gradient of S_out:

    dG = (dy xᵀ) ⊙ W        E = dG ⊙ (c bᵀ)
    dx = ((c bᵀ) ⊙ W)ᵀ dy + w ⊙ (b dSᵀ)      db = dGᵀ c + (w ⊙ x) dS      dc = dG b + (u ⊙ dy) S
    dS_in = u_Q dS + (u ⊙ dy)ᵀ c

and the decays' gradients are row and column sums of E. Several chunks go into one batched product,
few enough that the working set stays in cache; buffers are reused, since on a CPU a fresh one costs
page faults worth a pass over it. Products run in x's dtype; exponents, sums and states in float32
(float64 for float64).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.ssd.blocks import Workspace
from kernels.ssd.decay import build_decay, decay_gradients


def pick_chunk_size(length: int, dtype: torch.dtype) -> int:
    """Q for `chunk_size=0`: 64, or 128 for 16-bit products over 2,048 tokens and more."""
    return 128 if dtype.itemsize == 2 and length >= 2048 else 64


def ssd_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None, sin: Tensor | None,
    dt_bias: Tensor, cu_seqlens: Tensor, chunk_size: int, initial_state: Tensor | None,
    D: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, L, H, P] and the final state [B, H, P, N]; arguments as `kernels.ssd.ssd.ssd`."""
    chunk = chunk_size or pick_chunk_size(x.shape[1], x.dtype)
    result: tuple[Tensor, Tensor] = _ChunkedScan.apply(
        x, dt, A, B, C, cos, sin, dt_bias, cu_seqlens, initial_state, D, chunk
    )
    return result


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None,
        sin: Tensor | None, dt_bias: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None,
        D: Tensor | None, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, length, heads, head_dim = x.shape
        work = Workspace(x, B.shape[-1], cos, sin, chunk)
        decay = build_decay(dt, dt_bias, A, cu_seqlens, chunk, work.acc)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        chunks = -(-length // chunk)
        states = x.new_empty(chunks + 1, batch, heads, head_dim, B.shape[-1], dtype=work.acc)
        if initial_state is None:
            states[0].zero_()
        else:
            states[0].copy_(initial_state)

        for block in work.blocks():
            c, b, xh = (
                work.rotated("c", C, block),
                work.rotated("b", B, block),
                work.load("x", x, block),
            )
            w = work.decay_matrix(decay, block)
            decayed = work.scaled("decayed", xh, w[:, -1])
            work.product(states[block.first + 1 : block.last + 1], decayed.mT, b)
            gate = block.per_head(decay.entry_gate)  # [k, B, H, Q]
            for i in range(block.count):
                entry, leave = states[block.first + i], states[block.first + i + 1]
                leave.addcmul_(entry, gate[i, ..., -1, None, None])
            entries = work.low("entries", states[block.first : block.last].flatten(0, 2))
            out = torch.bmm(c, entries.mT, out=work.buffer("y", xh.shape))
            block.heads_view(out).mul_(gate.to(x.dtype).unsqueeze(-1))
            scores = torch.bmm(c, b.mT, out=work.buffer("scores", w.shape)).mul_(w)
            if D is not None:  # D x is one more number on the diagonal
                block.heads_view(scores).diagonal(dim1=-2, dim2=-1).add_(D.to(x.dtype)[:, None])
            out.baddbmm_(scores, xh)
            block.tokens_view(y).copy_(block.heads_view(out))

        ctx.save_for_backward(x, dt, A, B, C, cos, sin, dt_bias, cu_seqlens, D, states)
        ctx.chunk, ctx.has_initial_state = chunk, initial_state is not None
        ctx.set_materialize_grads(False)
        return y, states[chunks].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, cos, sin, dt_bias, cu_seqlens, D, states = ctx.saved_tensors
        chunk = ctx.chunk
        work = Workspace(x, B.shape[-1], cos, sin, chunk)
        decay = build_decay(dt, dt_bias, A, cu_seqlens, chunk, work.acc)
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
        inflow, outflow, through, d_log_delta = (torch.empty_like(decay.z) for _ in range(4))
        dD = torch.zeros(x.shape[2], dtype=work.acc, device=x.device)
        carried = (
            torch.zeros_like(states[0]) if d_final is None else d_final
        )  # dS of the last chunk

        for block in reversed(list(work.blocks())):
            c, b, xh = (
                work.rotated("c", C, block),
                work.rotated("b", B, block),
                work.load("x", x, block),
            )
            dyh = work.load("dy", dy, block)
            w = work.decay_matrix(decay, block)
            gate = block.per_head(decay.entry_gate)  # [k, B, H, Q]
            gated = work.scaled("gated", dyh, gate)

            # dS at every chunk border of the block, last to first
            d_states = work.buffer("d_states", (block.count + 1, *states.shape[1:]), work.acc)
            d_states[block.count].copy_(carried)
            work.product(d_states[:-1], gated.mT, c)
            for i in reversed(range(block.count)):
                d_states[i].addcmul_(d_states[i + 1], gate[i, ..., -1, None, None])
            carried = d_states[0].clone()
            entries_acc = states[block.first : block.last]
            crossing = work.buffer("crossing", entries_acc.shape, work.acc)
            torch.mul(entries_acc, d_states[1:], out=crossing)
            block.per_head(through).copy_(
                (crossing.sum((-2, -1)) * gate[..., -1]).unsqueeze(-1).expand_as(gate)
            )
            entries = work.low("entries", entries_acc.flatten(0, 2))
            d_leave = work.low("d_leave", d_states[1:].flatten(0, 2))

            # between chunks
            dc = torch.bmm(gated, entries, out=work.buffer("dc", c.shape))
            from_state = work.dots(dc, c).view(gate.shape)
            decayed = work.scaled("decayed", xh, w[:, -1])
            db = torch.bmm(decayed, d_leave, out=work.buffer("db", b.shape))
            to_state = work.dots(db, b).view(gate.shape)
            dxh = torch.bmm(b, d_leave.mT, out=work.buffer("dx", xh.shape))
            dxh.mul_(w[:, -1, :, None])

            # inside a chunk
            scores = torch.bmm(c, b.mT, out=work.buffer("scores", w.shape)).mul_(w)
            dw = torch.bmm(dyh, xh.mT, out=work.buffer("dw", w.shape))
            e = torch.mul(dw, scores, out=work.buffer("e", w.shape))
            if e.dtype != work.acc:  # rows and columns must cancel: sum them unrounded
                e = work.buffer("e_acc", w.shape, work.acc).copy_(e)
            e_diagonal = e.diagonal(dim1=-2, dim2=-1)
            own = e_diagonal.reshape(gate.shape).clone()
            e_diagonal.zero_()  # a token's path to itself has no decay in it
            received, sent = e.sum(-1).view(gate.shape), e.sum(-2).view(gate.shape)
            block.per_head(inflow).copy_(received - sent + from_state)
            block.per_head(outflow).copy_(to_state)
            block.per_head(d_log_delta).copy_(sent + own + to_state)
            if D is not None:
                on_diagonal = block.heads_view(dw).diagonal(dim1=-2, dim2=-1)  # [k, B, H, Q]
                dD += on_diagonal.sum((0, 1, 3), dtype=work.acc)
                block.heads_view(scores).diagonal(dim1=-2, dim2=-1).add_(D.to(x.dtype)[:, None])
            dg = dw.mul_(w)
            dc.baddbmm_(dg, b)
            db.baddbmm_(dg.mT, c)
            dxh.baddbmm_(scores.mT, dyh)
            block.tokens_view(dx).copy_(block.heads_view(dxh))
            work.unrotate(dc, dC, block)
            work.unrotate(db, dB, block)

        dz, dA = decay_gradients(decay, A, chunk, inflow, outflow, through, d_log_delta)
        return (
            dx, dz.transpose(1, 2).to(dt.dtype), dA.to(A.dtype), dB, dC, None, None,
            dz.sum((0, 2)).to(dt_bias.dtype), None, carried if ctx.has_initial_state else None,
            None if D is None else dD.to(D.dtype), None,
        )  # fmt: skip
