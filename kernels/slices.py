"""Tensors side by side in one buffer, as one matrix product of several weights writes them.

Such a buffer is [tokens, stride]; every tensor is some of its columns, the next one beginning where
the one before ends. Kernels read these slices where they lie, and write gradients into a buffer of
the same layout, so that the backward of the product is one product as well.

The first two dimensions of a tensor are its tokens, [B, L] or [T, 1]; the rest are its columns.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

TOKENS = 2  # dimensions
# A row of a buffer is a multiple of so many elements: for matrix products GPUs want 16 bytes, and a
# sector of their memory has 32.
ROW_ELEMENTS = 16


def row_stride(tensor: Tensor) -> int | None:
    """Elements from a token to the next one.

    None where tokens are not rows at equal distances, each contiguous.
    """
    return _row_stride(tensor.shape, tensor.stride())


def row_stride_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """`row_stride` of a tensor of this shape and these strides."""
    width = 1
    for size, stride in zip(reversed(shape[TOKENS:]), reversed(strides[TOKENS:]), strict=True):
        if size != 1 and stride != width:
            return None
        width *= size
    found, apart = 0, 0  # `apart`: what the dimension to the left must step by
    for size, stride in zip(reversed(shape[:TOKENS]), reversed(strides[:TOKENS]), strict=True):
        if size == 1:
            continue
        if found and stride != apart:
            return None
        found, apart = found or stride, stride * size
        if found < width:
            return None
    return found or width  # of one token: as if there were more


_row_stride = lru_cache(1 << 12)(row_stride_of)


def shared_stride(tensors: Sequence[Tensor]) -> int:
    """The row stride of the buffer whose adjacent columns the tensors are, in this order.

    0 where they are not, and for the tensors by which torch.compile traces.
    """
    if type(tensors[0]) is not Tensor:
        return 0
    layouts = tuple([(t.shape, t.stride(), t.storage_offset(), t.dtype) for t in tensors])
    stride = _shared_stride(layouts)
    if stride:
        storage = tensors[0].untyped_storage()._cdata
        for tensor in tensors[1:]:
            if tensor.untyped_storage()._cdata != storage:
                return 0
    return stride


@lru_cache(1 << 12)
def _shared_stride(
    layouts: tuple[tuple[torch.Size, tuple[int, ...], int, torch.dtype], ...],
) -> int:
    """As if all were in one storage: of shape, strides, first element and dtype of each."""
    shape, strides, begin, dtype = layouts[0]
    tokens, stride, end = shape[:TOKENS], _row_stride(shape, strides), begin
    for shape, strides, offset, other in layouts:
        same = offset == end and _row_stride(shape, strides) == stride
        if not same or shape[:TOKENS] != tokens or other != dtype:
            return 0
        end += math.prod(shape[TOKENS:])
    return stride if stride and end - begin <= stride else 0


def buffer_size(shapes: Sequence[torch.Size], stride: int) -> int:
    """Elements of the buffer that `sliced` cuts."""
    if stride:
        return math.prod(shapes[0][:TOKENS]) * stride
    return sum([math.prod(shape) for shape in shapes])


def sliced(buffer: Tensor, shapes: Sequence[torch.Size], stride: int) -> tuple[Tensor, ...]:
    """Views of a flat buffer: adjacent columns of its rows, which are `stride` apart.

    For stride 0, contiguous tensors, one after the other.
    """
    # sizes that torch.compile traces cannot be remembered
    views = _views if type(buffer) is Tensor else _views.__wrapped__
    return tuple([buffer.as_strided(*view) for view in views(tuple(shapes), stride)])


@lru_cache(1 << 12)
def _views(shapes: tuple[torch.Size, ...], stride: int) -> list[tuple[torch.Size, list[int], int]]:
    """Shape, strides and first element of each."""
    found, start = [], 0
    for shape in shapes:
        width = math.prod(shape[TOKENS:])
        tokens = [math.prod(shape[at + 1 : TOKENS]) for at in range(min(TOKENS, len(shape)))]
        columns = [math.prod(shape[at + 1 :]) for at in range(TOKENS, len(shape))]
        strides = [n * (stride or width) for n in tokens] + columns
        found.append((shape, strides, start))
        start += width if stride else math.prod(shape)
    return found


def empty_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised tensors like the given ones: slices of one buffer where those are.

    Else contiguous ones.
    """
    if stride := shared_stride(tensors):
        shapes = [tensor.shape for tensor in tensors]
        return sliced(tensors[0].new_empty(buffer_size(shapes, stride)), shapes, stride)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
