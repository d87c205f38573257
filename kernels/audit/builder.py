"""Operations of Triton's interpreter as a GPU does them. Imported by interpreter.install() alone.

A bfloat16 value is held as the float32 that equals it (the stock interpreter computes on its bits
as if they were integers). Every tensor the interpreter makes is a TensorHandle, and a TensorHandle
of dtype bfloat16 rounds what it is given to nearest, ties to even. So a bfloat16 operation is the
float32 one rounded once; for + - * / and sqrt that is the exactly rounded result.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from kernels.audit.memory import Memory

Handle = stock.TensorHandle

_stock_np_dtype = stock._get_np_dtype
_stock_fits = stock._validate_np_data_size


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values, each rounded to the nearest that bfloat16 holds; ties to even."""
    bits = values.view(np.uint32)
    if not (bits & np.uint32(0xFFFF)).any():
        return values
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (np.uint32(0x7FFF) + odd)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), np.float32(np.nan), rounded.view(np.float32))


def truncate_to_tfloat32(values: np.ndarray) -> np.ndarray:
    """float32 values without the 13 low bits of the mantissa: the coarsest a tensor core may be."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def is_bfloat16(dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16


def value_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype that holds values of a Triton dtype."""
    return np.dtype(np.float32) if is_bfloat16(dtype) else _stock_np_dtype(dtype)


def to_memory(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Values as they stand in memory; bfloat16 as uint16 bits."""
    if is_bfloat16(dtype):
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(_stock_np_dtype(dtype), copy=False)


def from_memory(stored: np.ndarray, dtype: Any) -> np.ndarray:
    """Inverse of `to_memory`."""
    if is_bfloat16(dtype):
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored


def finish_handle(handle: Any) -> None:
    """TensorHandle.__post_init__. Comparisons give bool data under their operands' dtype."""
    if is_bfloat16(handle.dtype):
        if handle.data.dtype == np.float32:
            handle.data = round_to_bfloat16(handle.data)
    elif not _stock_fits(handle.data, handle.dtype):
        raise ValueError(f"data of {handle.data.dtype} does not fit Triton's {handle.dtype}")


def fits(data: np.ndarray, dtype: Any) -> bool:
    return is_bfloat16(dtype) or _stock_fits(data, dtype)


class Builder(stock.InterpreterBuilder):
    """`memory` is that of the running launch."""

    def __init__(self) -> None:
        super().__init__()
        # device_assert on; Triton's own check for integer overflow off, it takes half of all time
        self.options = stock.InterpreterOptions(debug=True, sanitize_overflow=False)
        # Fewer would be refused by the compiler: the smallest depth of a product on NVIDIA GPUs.
        self.codegen_fns["min_dot_size"] = lambda lhs, rhs: (
            (1, 1, 256 // lhs.scalar.primitive_bitwidth)
        )
        self.memory: Memory | None = None

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self._memory.begin_program((x, y, z))

    @property
    def _memory(self) -> Memory:
        if self.memory is None:
            raise RuntimeError("no kernel is being launched")
        return self.memory

    # Constants and casts

    def get_bf16(self, value: float) -> Any:
        return Handle(np.array([value], np.float32), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        return Handle(src.data.astype(value_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        """Casts with a rounding mode of their own, and from and to float8."""
        if not (is_bfloat16(src.dtype) or is_bfloat16(dst_type)):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if src.dtype.scalar != tl.float32 or rounding_mode != stock._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError(
                f"cast from {src.dtype} to {dst_type} with {rounding_mode}: not interpreted"
            )
        bits = src.data.view(np.uint32) & np.uint32(0xFFFF0000)
        return Handle(bits.view(np.float32), tl.bfloat16)

    def create_bitcast(self, src: Any, dst_type: Any) -> Any:
        bits = to_memory(src.data, src.dtype)
        as_dst = np.uint16 if is_bfloat16(dst_type) else _stock_np_dtype(dst_type)
        return Handle(from_memory(bits.view(as_dst), dst_type), dst_type.scalar)

    # Arithmetic

    def create_add(self, lhs: Any, rhs: Any) -> Any:
        return self._int_op(lhs, rhs, np.add)

    def create_sub(self, lhs: Any, rhs: Any) -> Any:
        return self._int_op(lhs, rhs, np.subtract)

    def create_mul(self, lhs: Any, rhs: Any) -> Any:
        return self._int_op(lhs, rhs, np.multiply)

    def _int_op(self, lhs: Any, rhs: Any, op: np.ufunc) -> Any:
        result = self.binary_op(lhs, rhs, op)
        if lhs.data.dtype == np.int32:
            exact = op(lhs.data.astype(np.int64), rhs.data)
            if (exact != result.data).any():
                raise OverflowError(f"int32 overflow in {op.__name__}: make an operand int64")
        return result

    def create_fabs(self, arg: Any) -> Any:
        return self.unary_op(arg, np.abs)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        wide = x.data.astype(np.float64) * y.data + z.data
        return Handle(wide.astype(z.data.dtype), z.dtype.scalar)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_imprecise: int) -> Any:
        """Products of the operands' values, summed in float32 (float64 for float64, int32 for
        integers). "tf32" truncates float32 operands; "tf32x3" is taken for exact."""
        if a.dtype.scalar.is_fp8() or a.dtype.scalar.is_int():
            return super().create_dot(a, b, d, input_precision, max_imprecise)
        total = np.float64 if a.data.dtype == np.float64 else np.float32
        left, right = a.data.astype(total), b.data.astype(total)
        if a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            left, right = truncate_to_tfloat32(left), truncate_to_tfloat32(right)
        product = np.matmul(left, right) + d.data.astype(total)
        return Handle(product.astype(d.data.dtype), d.dtype.scalar)

    # Memory

    # Inside a tl.load that has an `other`. Triton asks `if other` on the way to create_masked_load,
    # which loses an `other` of one element that is 0: a tensor like any other when compiled.
    other_given = False

    def create_masked_load(
        self,
        ptrs: Any,
        mask: Any,
        other: Any,
        cache_modifier: Any,
        eviction_policy: Any,
        is_volatile: bool,
    ) -> Any:
        dtype = ptrs.get_element_ty()
        in_memory = np.dtype(np.uint16) if is_bfloat16(dtype) else _stock_np_dtype(dtype)
        filler = np.zeros((), in_memory) if self.other_given else None
        if other is not None:
            filler = to_memory(other.data, dtype)
        found = self._memory.load(ptrs.data, _lanes(mask), filler, in_memory)
        return Handle(from_memory(found, dtype), dtype)

    def create_masked_store(
        self, ptrs: Any, value: Any, mask: Any, cache_modifier: Any, eviction_policy: Any
    ) -> None:
        values = to_memory(value.data, ptrs.get_element_ty())
        self._memory.store(ptrs.data, values, _lanes(mask))

    def create_atomic_rmw(
        self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        self._touch_atomically(ptr, mask.data)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        self._touch_atomically(ptr, np.ones_like(ptr.data, bool))
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def _touch_atomically(self, ptr: Any, mask: np.ndarray) -> None:
        dtype = ptr.get_element_ty()
        if is_bfloat16(dtype):
            raise NotImplementedError("atomics on bfloat16 are not interpreted")
        self._memory.touch("atomic", ptr.data, mask, dtype.primitive_bitwidth // 8)

    def create_barrier(self) -> None:
        self._memory.barrier()


def _lanes(mask: Any) -> np.ndarray:
    """A descriptor's mask is an array, any other a handle."""
    return mask if isinstance(mask, np.ndarray) else mask.data


def remember_other(semantic: Any) -> Any:
    """Its `load`, which tells the builder whether an `other` is given."""
    stock_load = semantic.load

    def load(ptr: Any, mask: Any, other: Any, *rest: Any) -> Any:
        semantic.builder.other_given = other is not None
        try:
            return stock_load(ptr, mask, other, *rest)
        finally:
            semantic.builder.other_given = False

    return load
