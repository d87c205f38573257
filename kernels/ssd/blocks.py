"""Working set of the chunked scan: the order of the walk, its buffers, its layouts.

One row and a few of its heads are walked at a time, a block of chunks at once, so that what one
step writes is still in the core's cache when the next one reads it. In a block tensors are
head-major, [n, Q, P] with n = k·h and the chunk outermost, so that one chunk's states lie together.
Buffers are allocated once a call and used by every block: on a CPU a fresh one costs page faults
worth a pass over it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A thread's share of one [n, Q, max(Q, P, N)] buffer. About ten are in use at a time: smaller ones
# fit a second-level cache of 1 MiB better, larger ones spare calls.
_BLOCK_BYTES = 512 << 10

Pair = tuple[Tensor, Tensor]
Tables = Pair | None  # cos and sin, [k, 1, Q, N/2]


@dataclass(frozen=True)
class Block:
    """`count` chunks of `size` tokens: some of a row's full chunks, or its ragged last one."""

    chunks: slice
    tokens: slice
    count: int
    size: int

    def vectors(self, t: Tensor) -> Tensor:
        """[K, h, Q] → [k, h, size]"""
        return t[self.chunks, :, : self.size]

    def per_token(self, t: Tensor) -> Tensor:
        """[L, h, P] → [k, h, size, P]"""
        return self.head_major(t[self.tokens])

    def head_major(self, t: Tensor) -> Tensor:
        """[..., k·size, h, P] → [..., k, h, size, P]"""
        return t.unflatten(-3, (self.count, self.size)).transpose(-3, -2)


def blocks(length: int, chunk: int, most: int) -> list[Block]:
    """A row's full chunks, `most` at a time, then the ragged rest as a chunk of its own."""
    full, rest = divmod(length, chunk)
    found = []
    for first in range(0, full, most):
        last = min(first + most, full)
        tokens = slice(first * chunk, last * chunk)
        found.append(Block(slice(first, last), tokens, last - first, chunk))
    if rest:
        found.append(Block(slice(full, full + 1), slice(full * chunk, length), 1, rest))
    return found


def heads_at_once(x: Tensor, state_dim: int, groups: int, chunk: int) -> int:
    """Heads walked together: whole groups of B and C, a divisor of H."""
    per_group = x.shape[2] // groups
    fit = _BLOCK_BYTES // _bytes_per_head(x, state_dim, chunk)
    divisors = [n for n in range(1, groups + 1) if groups % n == 0]
    return per_group * max(n for n in divisors if n == 1 or n * per_group <= fit)


def chunks_at_once(x: Tensor, state_dim: int, chunk: int, heads: int) -> int:
    """Chunks in a block of `heads` heads; every thread has a core with a cache of its own."""
    per_chunk = heads * _bytes_per_head(x, state_dim, chunk)
    return max(1, _BLOCK_BYTES * torch.get_num_threads() // per_chunk)


def _bytes_per_head(x: Tensor, state_dim: int, chunk: int) -> int:
    return x.dtype.itemsize * min(chunk, x.shape[1]) * max(chunk, x.shape[-1], state_dim)


class Buffers:
    """Buffers of blocks of one shape, and the passes that fill them.

    Products are in `dtype`, x's; sums and states in `acc`, float32 (float64 for float64).
    """

    def __init__(self, chunks: int, heads: int, size: int, like: Tensor) -> None:
        self.chunks, self.heads, self.size = chunks, heads, size
        self.dtype, self.device = like.dtype, like.device
        self.acc = torch.promote_types(like.dtype, torch.float32)
        self._named: dict[tuple[str, torch.dtype], Tensor] = {}
        allowed = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
        self._causal = torch.zeros(size, size, dtype=self.acc, device=like.device)
        self._causal.masked_fill_(~allowed, -torch.inf)  # [Q, Q]: 0 or -inf

    def named(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The buffer of that name and dtype; it holds whatever was last written there."""
        key = name, dtype or self.dtype
        found = self._named.get(key)
        if found is None:
            found = self._named[key] = torch.empty(shape, dtype=key[1], device=self.device)
        return found

    def by_head(self, t: Tensor) -> Tensor:
        """[n, Q, P] → [k, h, Q, P]"""
        return t.view(self.chunks, self.heads, *t.shape[1:])

    def diagonal(self, t: Tensor) -> Tensor:
        """[n, Q, Q] → its diagonals, [k, h, Q], as a view"""
        return self.by_head(t).diagonal(dim1=-2, dim2=-1)

    def load(self, name: str, source: Tensor) -> Tensor:
        """[k, h, Q, P], a view of tokens → [n, Q, P]"""
        return self.named(name, *source.shape).copy_(source).flatten(0, 1)

    def low(self, name: str, t: Tensor) -> Tensor:
        """t in the product dtype, itself where that is the accumulation dtype."""
        return t if self.dtype == self.acc else self.named(name, *t.shape).copy_(t)

    def exact(self, name: str, t: Tensor) -> Tensor:
        """t in the accumulation dtype, itself where it is so."""
        return t if t.dtype == self.acc else self.named(name, *t.shape, dtype=self.acc).copy_(t)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """[n, Q, P] = a @ b"""
        return torch.bmm(a, b, out=self.named(name, a.shape[0], a.shape[1], b.shape[2]))

    def state_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """a @ b into `out` [k, h, P, N] of the accumulation dtype."""
        if self.dtype == self.acc:
            torch.bmm(a, b, out=out.flatten(0, 1))
        else:
            out.flatten(0, 1).copy_(self.product("low state", a, b))

    def scaled(self, name: str, t: Tensor, factors: Tensor) -> Tensor:
        """t times factors of its shape, or [n, Q, 1]: one a row."""
        return torch.mul(t, factors, out=self.named(name, *t.shape))

    def dots(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Row-wise a · b of [n, Q, N] into out [k, h, Q]."""
        terms = torch.mul(a, b, out=self.named("terms", *a.shape))
        torch.sum(self.by_head(terms), -1, dtype=out.dtype, out=out)

    def decay_matrix(self, hi: Tensor, lo: Tensor, sent: Tensor) -> Tensor:
        """W [n, Q, Q] in the product dtype from [k, h, Q]; its last row is w."""
        w = self.named("decay", *hi.shape, hi.shape[-1], dtype=self.acc)
        torch.sub(hi.unsqueeze(-1), hi.unsqueeze(-2), out=w)
        w.add_(lo.unsqueeze(-1)).add_(sent.unsqueeze(-2)).add_(self._causal).exp2_()
        return self.low("decay", w).flatten(0, 1)

    def rotate_in(self, B: Tensor, C: Tensor, tables: Tables, block: Block) -> Pair:
        """RoPE(B), RoPE(C): tokens [k·Q, G, N] → [n, Q, N], each group repeated for its heads."""
        # Memory is read in its own order, then turned head-major in the cache.
        staged = self.named("staged", 2, *B.shape, dtype=self.acc)
        staged[0].copy_(B)
        staged[1].copy_(C)
        t = block.head_major(staged)  # [2, k, G, Q, N]
        _, k, groups, q, n = t.shape
        out = self.named("rotated", 2, k, groups, self.heads // groups, q, n)
        if tables is not None and groups == self.heads and self.dtype == self.acc:
            _rotate(t, tables, out.squeeze(3), sign=1)
        else:
            if tables is not None:
                t = _rotate(t, tables, self.named("turned", *t.shape, dtype=self.acc), sign=1)
            out.copy_(t.unsqueeze(3))
        b, c = out.view(2, -1, q, n).unbind(0)
        return b, c

    def rotate_out(
        self, grads: Tensor, dB: Tensor, dC: Tensor, tables: Tables, block: Block
    ) -> None:
        """Gradients [2, n, Q, N] of what `rotate_in` returned into their tokens, [k·Q, G, N]."""
        groups = dB.shape[1]
        grads = grads.view(2, self.chunks, groups, -1, *grads.shape[2:])
        grads = grads.sum(3, dtype=self.acc) if groups < self.heads else grads.squeeze(3)
        staged = self.named("staged", 2, *dB.shape, dtype=self.acc)
        t = block.head_major(staged)  # [2, k, G, Q, N]
        if tables is None:
            t.copy_(grads)
        else:
            _rotate(self.exact("turned", grads), tables, t, sign=-1)
        dB.copy_(staged[0])
        dC.copy_(staged[1])


def _rotate(source: Tensor, tables: Pair, out: Tensor, sign: int) -> Tensor:
    """[..., k, G, Q, N] by the tables' angles, or back with sign -1"""
    cos, sin = tables
    half = cos.shape[-1]
    first, second = source[..., :half], source[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out
