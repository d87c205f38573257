"""Sharded training state as parts of global tensors, for torch.distributed.checkpoint (DCP).

A rank owns flat ranges of its tensor-parallel part of each parameter (ZeRO). Each range is cut into
at most 2·ndim - 1 boxes of the global tensor, so what is stored does not know the layout that wrote
it: any other layout asks for its own boxes and DCP finds the overlaps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

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


class GlobalTensor:
    """This rank's parts of one global tensor, in the form DCP's planners ask for."""

    def __init__(self, shape: tuple[int, ...], parts: list[Part]) -> None:
        self.shape, self.parts = torch.Size(shape), parts

    def size(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.data.shape))
            for p in self.parts
        ]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(part.data),
                    size=self.shape,
                ),
            )
            for part, chunk in zip(self.parts, self.__create_chunk_list__(), strict=True)
        ]

    def part_at(self, index: MetadataIndex) -> Tensor:
        """The local memory of the part that begins at index.offset."""
        return next(p.data for p in self.parts if torch.Size(p.offsets) == index.offset)


class SavePlanner(DefaultSavePlanner):
    """DCP's planner, taught where the parts of a GlobalTensor lie."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor to write for a planned item."""
        value = self.state_dict[index.fqn]
        return value.part_at(index) if isinstance(value, GlobalTensor) else value


class LoadPlanner(DefaultLoadPlanner):
    """DCP's planner, taught where the parts of a GlobalTensor lie."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """As the base class, but for its search for meta tensors, which drops what is no tensor."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The memory to read a planned item into."""
        value = self.state_dict[index.fqn]
        return value.part_at(index) if isinstance(value, GlobalTensor) else value
