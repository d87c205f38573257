"""The walk of the chunked scan, forward or backward: rows, then heads, then blocks of chunks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ssd.blocks import Block, Buffers, Tables, blocks, chunks_at_once
from kernels.ssd.decay import Decay, build_decay


@dataclass(frozen=True)
class Part:
    """One row and h of its heads, g of its groups; of its tensors, what belongs to them."""

    row: int
    index: int  # among the row's parts
    heads: slice
    groups: slice
    x: Tensor  # [L, h, P]
    B: Tensor  # [L, g, N]
    C: Tensor  # [L, g, N]
    tables: Tables  # [L, 1, N/2]
    decay: Decay  # [K, h, Q]
    gate: Tensor  # u in x's dtype
    D: Tensor | None  # [h, 1] in x's dtype


@dataclass(frozen=True)
class Operands:
    """What both passes need of a block of k chunks, n = k·h."""

    tables: Tables  # [k, 1, Q, N/2]
    b: Tensor  # [n, Q, N], rotated
    c: Tensor  # [n, Q, N], rotated
    x: Tensor  # [n, Q, P]
    w: Tensor  # [n, Q, Q]
    last: Tensor  # w's last row, [n, Q, 1]
    gate: Tensor  # u, [n, Q, 1]
    carried: Tensor  # u's last entry, what a chunk keeps of a state: [k, h], in `acc`


class Walk:
    """Arguments as the scan's; `heads` is h, the heads walked together."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None,
        sin: Tensor | None, dt_bias: Tensor, cu_seqlens: Tensor, D: Tensor | None, chunk: int,
        heads: int,
    ) -> None:  # fmt: skip
        self.acc = torch.promote_types(x.dtype, torch.float32)
        self.decay = build_decay(dt, dt_bias, A, cu_seqlens, chunk, heads, self.acc)
        most = chunks_at_once(x, B.shape[-1], chunk, heads)
        self.blocks = blocks(x.shape[1], chunk, most)
        self._x, self._B, self._C, self._heads = x, B, C, heads
        self._parts_a_row = x.shape[2] // heads
        self._gate = self.decay.gate.to(x.dtype)
        self._D = None if D is None else D.to(x.dtype).view(-1, heads, 1)
        self._cos = None if cos is None else cos.to(self.acc).unsqueeze(2)  # [B, L, 1, N/2]
        self._sin = None if sin is None else sin.to(self.acc).unsqueeze(2)
        self._buffers: dict[tuple[int, int], Buffers] = {}

    def parts(self) -> Iterator[Part]:
        for row in range(self._x.shape[0]):
            tables = None
            if self._cos is not None and self._sin is not None:
                tables = self._cos[row], self._sin[row]
            for i in range(self._parts_a_row):
                heads, groups = self._share(i, self._x), self._share(i, self._B)
                yield Part(
                    row, i, heads, groups, self._x[row, :, heads], self._B[row, :, groups],
                    self._C[row, :, groups], tables, self.decay.part(row, i), self._gate[row, i],
                    None if self._D is None else self._D[i],
                )  # fmt: skip

    def _share(self, i: int, t: Tensor) -> slice:
        """The i-th part's share of t's heads or groups"""
        size = t.shape[2] // self._parts_a_row
        return slice(i * size, (i + 1) * size)

    def buffers(self, block: Block) -> Buffers:
        shape = block.count, block.size
        if shape not in self._buffers:
            self._buffers[shape] = Buffers(block.count, self._heads, block.size, self._x)
        return self._buffers[shape]

    def operands(self, part: Part, block: Block) -> Operands:
        buffers, decay = self.buffers(block), part.decay
        tables = None
        if part.tables is not None:
            tables = block.per_token(part.tables[0]), block.per_token(part.tables[1])
        b, c = buffers.rotate_in(part.B[block.tokens], part.C[block.tokens], tables, block)
        x = buffers.load("x", block.per_token(part.x))
        w = buffers.decay_matrix(*(block.vectors(t) for t in (decay.hi, decay.lo, decay.sent)))
        gate = block.vectors(part.gate).reshape(-1, block.size, 1)
        carried = block.vectors(decay.gate)[..., -1]
        return Operands(tables, b, c, x, w, w[:, -1].unsqueeze(-1), gate, carried)
