"""Working set of the chunked scan: which chunks go into one batch, their buffers and layouts.

Buffers are head-major, [k·B·H, Q, P], with the chunk outermost so that one chunk's states lie
together. A buffer is allocated once a call and reused by every block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ssd.decay import Decay

_BLOCK_BYTES = 1 << 20  # of one [Q, max(Q, P, N)] buffer over a block's chunks, rows and heads


@dataclass(frozen=True)
class Block:
    """`count` consecutive chunks of `size` tokens from chunk `first`, token `start`."""

    first: int
    count: int
    start: int
    size: int
    batch: int

    @property
    def last(self) -> int:
        return self.first + self.count

    def tokens_view(self, t: Tensor) -> Tensor:
        """[B, L, H, P] → [k, B, H, Q, P]"""
        view = t[:, self.start : self.start + self.count * self.size]
        return view.unflatten(1, (self.count, self.size)).permute(1, 0, 3, 2, 4)

    def heads_view(self, t: Tensor) -> Tensor:
        """[k·B·H, Q, P] → [k, B, H, Q, P]"""
        return t.unflatten(0, (self.count, self.batch, -1))

    def per_head(self, t: Tensor) -> Tensor:
        """[B, H, L] → [k, B, H, Q]"""
        view = t[..., self.start : self.start + self.count * self.size]
        return view.unflatten(-1, (self.count, self.size)).permute(2, 0, 1, 3)


class Workspace:
    """Buffers and the passes that fill them, in x's dtype (products) and `acc` (sums, states)."""

    def __init__(
        self, x: Tensor, state_dim: int, cos: Tensor | None, sin: Tensor | None, chunk: int
    ) -> None:
        self.dtype = x.dtype
        self.acc = torch.promote_types(x.dtype, torch.float32)
        self._like, self._chunk, self._widest = x, chunk, max(chunk, x.shape[-1], state_dim)
        self._cos = None if cos is None else cos.to(self.acc)[:, :, None]  # [B, L, 1, N/2]
        self._sin = None if sin is None else sin.to(self.acc)[:, :, None]
        q = min(chunk, x.shape[1])
        causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
        self._forbidden = torch.full((), -torch.inf, dtype=self.acc, device=x.device)
        self._causal = torch.where(causal, 0, self._forbidden)  # [Q, Q]: 0 or -inf
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def blocks(self) -> Iterator[Block]:
        """Full chunks a few at a time, then the ragged rest as a chunk of its own."""
        batch, length, heads, _ = self._like.shape
        q = self._chunk
        full, rest = divmod(length, q)
        per_chunk = batch * heads * q * self._widest * self.dtype.itemsize
        most = max(1, _BLOCK_BYTES // per_chunk)
        for first in range(0, full, most):
            yield Block(first, min(most, full - first), first * q, q, batch)
        if rest:
            yield Block(full, 1, full * q, rest, batch)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The named buffer, cut to `shape`; its contents are whatever was last there."""
        key, size = (name, dtype or self.dtype), torch.Size(shape).numel()
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = self._like.new_empty(size, dtype=key[1])
        return self._buffers[key][:size].view(shape)

    def load(self, name: str, t: Tensor, block: Block) -> Tensor:
        """[B, L, H, P] → [k·B·H, Q, P]"""
        view = block.tokens_view(t)
        return self.buffer(name, view.shape).copy_(view).flatten(0, 2)

    def rotated(self, name: str, t: Tensor, block: Block) -> Tensor:
        """RoPE(B or C) [B, L, G, N] → [k·B·H, Q, N], each group repeated for its heads."""
        view = block.tokens_view(t).unsqueeze(3)  # [k, B, G, 1, Q, N]
        k, batch, groups, _, q, n = view.shape
        out = self.buffer(name, (k, batch, groups, self._like.shape[2] // groups, q, n))
        if self._cos is None:
            return out.copy_(view).flatten(0, 3)
        if self.dtype == self.acc:
            self._rotate(view.expand(out.shape), block, out, sign=1)
        else:  # mixed dtypes in one operation would make hidden copies; these are reused
            exact = self.buffer("unrotated", view.shape, self.acc).copy_(view)
            turned = self.buffer("turned", view.shape, self.acc)
            out.copy_(self._rotate(exact, block, turned, sign=1))
        return out.flatten(0, 3)

    def unrotate(self, grad: Tensor, out: Tensor, block: Block) -> None:
        """Gradient [k·B·H, Q, N] of `rotated` into its tokens of [B, L, G, N]."""
        target = block.tokens_view(out).unsqueeze(3)  # [k, B, G, 1, Q, N]
        view = block.heads_view(grad).unflatten(2, (target.shape[2], -1))  # [k, B, G, H/G, Q, N]
        if view.shape[3] > 1:
            view = view.sum(3, keepdim=True, dtype=self.acc)
        if self._cos is None:
            target.copy_(view)
        elif self.dtype == self.acc:
            self._rotate(view, block, target, sign=-1)
        else:
            exact = self.buffer("unrotated", view.shape, self.acc).copy_(view)
            turned = self.buffer("turned", view.shape, self.acc)
            target.copy_(self._rotate(exact, block, turned, sign=-1))

    def _rotate(self, source: Tensor, block: Block, out: Tensor, sign: int) -> Tensor:
        assert self._cos is not None
        assert self._sin is not None
        cos = block.tokens_view(self._cos).unsqueeze(3)  # [k, B, 1, 1, Q, N/2]
        sin = block.tokens_view(self._sin).unsqueeze(3)
        first, second = source.chunk(2, dim=-1)
        out_first, out_second = out.chunk(2, dim=-1)
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
        return out

    def decay_matrix(self, decay: Decay, block: Block) -> Tensor:
        """W [k·B·H, Q, Q] in the product dtype; its last row is w."""
        to = block.per_head(decay.cumulative).unsqueeze(-1)  # [k, B, H, Q, 1]
        since = block.per_head(decay.cumulative - decay.log_delta).unsqueeze(-2)
        ids = block.per_head(decay.segment.unsqueeze(1))  # [k, B, 1, Q]
        same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
        q = block.size
        mask = torch.where(same, self._causal[:q, :q], self._forbidden)  # [k, B, 1, Q, Q]
        shape = (*to.shape[:3], q, q)
        w = torch.sub(to, since, out=self.buffer("decay", shape, self.acc)).add_(mask).exp_()
        return self.low("decay_low", w.flatten(0, 2))

    def product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """a @ b into `out` [k, B, H, P, N] of the accumulation dtype."""
        target = out.flatten(0, 2)
        if self.dtype == self.acc:
            torch.bmm(a, b, out=target)
        else:
            target.copy_(torch.bmm(a, b, out=self.buffer("product", target.shape)))

    def low(self, name: str, t: Tensor) -> Tensor:
        """[n, Q, P] in the product dtype, itself where that is the accumulation dtype."""
        return t if self.dtype == self.acc else self.buffer(name, t.shape).copy_(t)

    def scaled(self, name: str, t: Tensor, rows: Tensor) -> Tensor:
        """Each row of [n, Q, P] times its factor, rows [n, Q] or any shape of as many numbers."""
        factors = rows.reshape(*t.shape[:2], 1).to(t.dtype)
        return torch.mul(t, factors, out=self.buffer(name, t.shape))

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """Row-wise a · b of [n, Q, N], summed in the accumulation dtype: [n, Q]."""
        terms = torch.mul(a, b, out=self.buffer("terms", a.shape))
        return terms.sum(-1, dtype=self.acc)
