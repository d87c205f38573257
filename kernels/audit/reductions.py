"""Reductions and scans of Triton's interpreter, in the order and precision of a GPU's: as a tree.

Imported by interpreter.install() alone. The stock interpreter walks element by element in Python;
a tree takes log2(n) vectorised steps. Both orders are allowed by an associative combination.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

_stock_sum = stock.ReduceOps.sum


def reduce(operation: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """ReduceOps.generic_reduce: neighbours are combined until one element is left on the axis."""
    values = [part.handle.data for part in inputs]
    axis, ndim = operation.axis, values[0].ndim
    if axis is None:
        values, axis = [data.reshape(-1) for data in values], 0
    while (length := values[0].shape[axis]) > 1:
        halves = [
            operation.to_tensor(data.take(range(start, length, 2), axis), part.dtype)
            for start in (0, 1)
            for data, part in zip(values, inputs, strict=True)
        ]
        values = _combine(operation, halves)
    if not operation.keep_dims:
        values = [data.squeeze(axis) for data in values]
    elif operation.axis is None:
        values = [data.reshape((1,) * ndim) for data in values]
    return _tensors(operation, values, inputs)


def scan(operation: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """ScanOps.generic_scan: after step d, every element combines the last 2d."""
    values = [part.handle.data for part in inputs]
    axis, length = operation.axis, values[0].shape[operation.axis]
    place = np.arange(length).reshape([-1 if i == axis % values[0].ndim else 1
                                       for i in range(values[0].ndim)])  # fmt: skip
    shift = 1
    while shift < length:
        earlier = _tensors(operation, [np.roll(data, shift, axis) for data in values], inputs)
        combined = _combine(operation, [*earlier, *_tensors(operation, values, inputs)])
        values = [
            np.where(place >= shift, new, old) for new, old in zip(combined, values, strict=True)
        ]
        shift *= 2
    return _tensors(operation, values, inputs)


def sum_with_rounding(operation: Any, part: Any) -> Any:
    """ReduceOps.sum: 16-bit floats are rounded at every addition, as the compiled sum does."""
    if part.dtype.is_floating() and part.dtype.primitive_bitwidth == 16:
        return reduce(operation, (part,))[0]
    return _stock_sum(operation, part)


def _combine(operation: Any, tensors: list[Any]) -> list[np.ndarray]:
    result = operation.combine_fn(*tensors)
    results = result if isinstance(result, tuple) else (result,)
    return [np.asarray(r.handle.data if isinstance(r, tl.tensor) else r) for r in results]


def _tensors(operation: Any, values: list[np.ndarray], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        operation.to_tensor(data, part.dtype) for data, part in zip(values, inputs, strict=True)
    )
