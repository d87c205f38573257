"""Problems of the Triton scan, and the shapes that an algorithm for them may have."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Problem:
    """Sizes of one scan; groups of B and C divide the heads."""

    batch: int
    length: int
    heads: int
    groups: int
    head_dim: int
    state_dim: int
    dtype: torch.dtype

    @property
    def per_group(self) -> int:
        """Heads that share B and C."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Shape:
    """How programs share out a pass over a problem (`fused_forward`, `fused_backward`).

    fused      a program walks a whole row: one launch
    segmented  a program walks a segment of a row: two launches
    split      a program has a chunk of a row: three launches
    """

    kind: Literal["fused", "segmented", "split"]
    heads: int = 1  # of a group in one program: held at once, or walked one after the other (split)
    segments: int = 1  # of a row
    edge: int = 0  # chunks of the first segment; the last one has what is left
    middle: int = 0  # chunks of every other segment
    span: int = 1  # chunks between states that are passed on (split, backward)

    def chunks_of(self, segment: int, chunks: int) -> range:
        """The chunks of one segment of a row of `chunks`."""
        first = 0 if segment == 0 else self.edge + (segment - 1) * self.middle
        last = segment == self.segments - 1
        return range(first, chunks if last else self.edge + segment * self.middle)


def segmented(chunks: int, segments: int, heads: int) -> Shape:
    """Cut rows into at least three segments, of which the first and the last are four times the
    others.

    Outputs of the first are made by the first launch and those of the last by the second, so both
    take as long as that; the others are read by both launches, so they are short.
    """
    middle = max(1, chunks // (segments + 6))
    edge = (chunks - (segments - 2) * middle + 1) // 2
    return Shape("segmented", heads, segments, edge, middle)
