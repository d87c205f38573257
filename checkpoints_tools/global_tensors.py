"""Sharded training state as parts of global tensors.

A rank owns flat ranges of its tensor-parallel part of each parameter (ZeRO). Each range is cut into
at most 2·ndim - 1 boxes of the global tensor, so what is stored does not know the layout that wrote
it: any other layout asks for its own boxes, and reads where they overlap with those that are there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from parallel.params import ParamInfo

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def boxes_of_range(start: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Cut elements [start, end) of a flattened tensor into boxes, in order, each contiguous."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    inner, rest = prod(shape[1:]), shape[1:]
    first, last = -(-start // inner), end // inner  # whole rows [first, last)
    if first > last:  # within one row
        yield from _in_row(last, start - last * inner, end - last * inner, rest)
        return
    if start < first * inner:
        yield from _in_row(first - 1, start - (first - 1) * inner, inner, rest)
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    if last * inner < end:
        yield from _in_row(last, 0, end - last * inner, rest)


def _in_row(row: int, start: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    for offsets, sizes in boxes_of_range(start, end, shape):
        yield (row, *offsets), (1, *sizes)


@dataclass(frozen=True)
class Part:
    """A box of a global tensor and the local memory that holds it."""

    offsets: tuple[int, ...]
    data: Tensor


def global_parts(info: ParamInfo, start: int, flat: Tensor) -> list[Part]:
    """The parts that elements [start, start + len(flat)) of the flattened local tensor are.

    Elements outside info.ranges (vocabulary padding) belong to no part.
    """
    parts = []
    for offsets, sizes in boxes_of_range(start, start + flat.numel(), info.local_shape):
        at = _flat_index(offsets, info.local_shape) - start
        box = flat.narrow(0, at, prod(sizes)).view(sizes)
        low, high = offsets[info.dim], offsets[info.dim] + sizes[info.dim]
        for part in info.ranges:
            begin, end = max(low, part.local), min(high, part.local + part.length)
            if begin < end:
                moved = list(offsets)
                moved[info.dim] = part.start + begin - part.local
                parts.append(Part(tuple(moved), box.narrow(info.dim, begin - low, end - begin)))
    return parts


def _flat_index(offsets: tuple[int, ...], shape: tuple[int, ...]) -> int:
    index = 0
    for offset, size in zip(offsets, shape, strict=True):
        index = index * size + offset
    return index


@dataclass(frozen=True)
class GlobalTensor:
    """This rank's parts of one global tensor."""

    shape: tuple[int, ...]  # of the whole
    parts: list[Part]
