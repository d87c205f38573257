"""Device memory during one interpreted launch: every access checked, every byte counted.

The bytes that the tensor arguments span are copied into one block, 1 MiB apart, so that an index
that runs off one buffer reaches no other (arguments that overlap share one). Loads and stores go to
the block alone, and each of its bytes has a state: does it belong to an element of an argument, has
a program loaded or stored it. An access outside the arguments, at an address that is no multiple of
the element size, or whose result depends on the order in which programs (or a program's own
threads) run, is a MemoryFault. Programs that synchronise through atomics are refused as well: the
bytes they exchange look like any other race.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

Access = Literal["load", "store", "atomic"]

_GAP = 1 << 20  # bytes between buffers; never touched, so they cost address space only
_ALIGN = 256  # addresses keep their remainder by this

# What a byte's state holds. The last four say what this launch has done to it.
_OWNED = 1  # an element of an argument
_LOADED = 2  # by a program that has ended
_STORED = 4
_ATOMIC = 8
_FRESH = 16  # stored by the running program, no barrier since
_MARK: dict[Access, int] = {"load": _LOADED, "store": _STORED, "atomic": _ATOMIC}
_FORBIDDEN: dict[Access, int] = {
    "load": _STORED | _ATOMIC | _FRESH,
    "store": _LOADED | _STORED | _ATOMIC,
    "atomic": _LOADED | _STORED,
}


class MemoryFault(RuntimeError):
    """A kernel touched memory that it must not touch, or in an order that no GPU promises."""


@dataclass(frozen=True)
class _Argument:
    name: str
    start: int  # of its first byte in the block
    end: int  # one past its last byte


@dataclass(frozen=True)
class _Buffer:
    span: range  # addresses that arguments span
    place: slice  # of their copy in the block
    original: np.ndarray


class Memory:
    """The tensors a launch of `kernel` is given, as (argument name, CPU tensor), and their copies.

    Raises ValueError for a tensor that is not on the CPU.
    """

    def __init__(self, kernel: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
        self.kernel = kernel
        self.program: tuple[int, ...] = ()
        self.programs = 0
        self.bytes: dict[Access, int] = {"load": 0, "store": 0, "atomic": 0}
        self._touched: list[tuple[Access, int, np.ndarray]] = []  # by the running program
        for name, tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{kernel}: argument {name!r} is on {tensor.device}; interpreted kernels take"
                    " CPU tensors"
                )
        self._place(_merged([_span(tensor) for _, tensor in tensors]))
        block = torch.from_numpy(self._block).untyped_storage()
        self._copies: dict[int, Tensor] = {}
        self._arguments: list[_Argument] = []
        for name, tensor in tensors:
            size, span = tensor.element_size(), _span(tensor)
            start = self._moved(span.start)
            self._copies[id(tensor)] = tensor.new_empty(0).set_(
                block, start // size, tensor.size(), tensor.stride()
            )
            self._arguments.append(_Argument(name, start, start + len(span)))
            shape = (*tensor.shape, size)
            strides = (*(stride * size for stride in tensor.stride()), 1)
            as_strided(self._state[1][start:], shape, strides)[...] = _OWNED

    def _place(self, spans: Sequence[range]) -> None:
        """Give every span of addresses a place in one block and copy its bytes there."""
        total = _GAP + sum(len(span) + _ALIGN + _GAP for span in spans)
        self._block = np.empty(total // 8 * 8, np.uint8)
        state = np.zeros(self._block.size, np.uint8)  # not zeros_like, which touches the gaps
        self._state = {size: state.view(f"u{size}") for size in (1, 2, 4, 8)}
        self._base = np.uint64(self._block.ctypes.data)
        self._buffers: list[_Buffer] = []
        start = _GAP
        for span in spans:
            start += (span.start - int(self._base) - start) % _ALIGN
            original = np.ctypeslib.as_array((ctypes.c_uint8 * len(span)).from_address(span.start))
            self._block[start : start + len(span)] = original
            self._buffers.append(_Buffer(span, slice(start, start + len(span)), original))
            start += len(span) + _GAP

    def _moved(self, address: int) -> int:
        """Where a tensor's first byte stands in the block; 0 if it has none."""
        for buffer in self._buffers:
            if address in buffer.span:
                return buffer.place.start + address - buffer.span.start
        return 0

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The tensor in the block that stands for this argument (the same object as given)."""
        return self._copies[id(tensor)]

    def begin_program(self, program: tuple[int, ...]) -> None:
        """`program` runs now; what ran before has ended."""
        self._end_program()
        self.program = program
        self.programs += 1

    def barrier(self) -> None:
        """What the running program stored may be loaded by all its threads from here on."""
        for access, size, index in self._touched:
            if access == "store":
                self._state[size][index] &= ~_repeat(_FRESH, size)

    def load(
        self, addresses: np.ndarray, mask: np.ndarray, other: np.ndarray | None, dtype: np.dtype
    ) -> np.ndarray:
        """Elements at `addresses` (uint64, any shape); all bits set where mask is off and no
        `other` is given, which is NaN for a float: Triton leaves such elements undefined."""
        index = self.touch("load", addresses, mask, dtype.itemsize)
        found = self._block.view(dtype)[index]
        if index.size == addresses.size:
            return found.reshape(addresses.shape)
        if other is None:
            result = np.full((*addresses.shape, dtype.itemsize), 0xFF, np.uint8).view(dtype)[..., 0]
        else:
            result = np.array(np.broadcast_to(other, addresses.shape), dtype)
        result[mask] = found
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        """Store `values` (same shape as `addresses`; their dtype is the memory's)."""
        index = self.touch("store", addresses, mask, values.dtype.itemsize)
        active = values.ravel() if index.size == values.size else values[mask]
        bits = active.view(f"u{active.itemsize}")
        stored = self._block.view(bits.dtype)
        stored[index] = bits
        lost = stored[index] != bits
        if lost.any():
            what = self._describe("store", int(index[lost][0]) * bits.itemsize, bits.itemsize)
            raise MemoryFault(f"{what}: a race, two lanes of this store differ in what they store")

    def touch(
        self, access: Access, addresses: np.ndarray, mask: np.ndarray, size: int
    ) -> np.ndarray:
        """Check and record an access of `size` bytes at each address that the mask (same shape)
        leaves on. Returns those addresses as indices of elements of the block, [lanes].

        Raises MemoryFault.
        """
        active = addresses.ravel() if mask.all() else addresses[mask]
        offset = active - self._base  # what lies below the block wraps to far above it
        index = (offset // np.uint64(size)).view(np.int64)
        if not index.size:
            return index
        if (offset % np.uint64(size)).any() or offset.max() >= self._block.size:
            self._raise(access, offset, size)
        state = self._state[size]
        owned, forbidden = _repeat(_OWNED, size), _repeat(_FORBIDDEN[access], size)
        if ((state[index] & (owned | forbidden)) != owned).any():
            self._raise(access, offset, size)
        if access == "store":
            state[index] |= _repeat(_FRESH, size)
        self._touched.append((access, size, index))
        self.bytes[access] += index.size * size
        return index

    def finish(self) -> None:
        """All programs have ended: give the tensors what was stored."""
        self._end_program()
        for buffer in self._buffers:
            if (self._state[1][buffer.place] & (_STORED | _ATOMIC)).any():
                buffer.original[:] = self._block[buffer.place]

    def distinct(self, access: Access) -> int:
        """Distinct bytes that the launch has accessed so; after `finish`."""
        states = (self._state[1][buffer.place] for buffer in self._buffers)
        return sum(np.count_nonzero(state & _MARK[access]) for state in states)

    def _end_program(self) -> None:
        for access, size, index in self._touched:
            state = self._state[size]
            state[index] = state[index] & ~_repeat(_FRESH, size) | _repeat(_MARK[access], size)
        self._touched.clear()

    def _raise(self, access: Access, offsets: np.ndarray, size: int) -> NoReturn:
        """For the first lane at fault."""
        for offset in offsets.tolist():
            touched = self._state[1][offset : offset + size]
            owned = touched.size == size and bool((touched & _OWNED).all())
            state = int(np.bitwise_or.reduce(touched))
            if offset % size or not owned or state & _FORBIDDEN[access]:
                break
        what = self._describe(access, offset, size)
        if offset % size:
            raise MemoryFault(f"{what}: not a multiple of the element size")
        if not owned:
            raise MemoryFault(f"{what}: out of bounds, no element of an argument is there")
        if state & _FORBIDDEN[access] & _FRESH:
            raise MemoryFault(
                f"{what}: the program stored it itself; put tl.debug_barrier() between, another of"
                " its threads may have made the store"
            )
        done = (
            "atomically updated" if state & _ATOMIC else "stored" if state & _STORED else "loaded"
        )
        raise MemoryFault(f"{what}: a race, another program {done} it in this launch")

    def _describe(self, access: Access, offset: int, size: int) -> str:
        """The access by the argument nearest to it."""
        at = offset if offset < 1 << 63 else offset - (1 << 64)
        near = min(self._arguments, key=lambda a: max(a.start - at, at - a.end + 1, 0))
        return (
            f"{self.kernel}, program {self.program}: {access} of {size} bytes"
            f" at byte {at - near.start} of argument {near.name!r},"
            f" which spans {near.end - near.start} bytes"
        )


def _repeat(bits: int, size: int) -> np.unsignedinteger:
    """`bits` in each of `size` bytes."""
    return np.dtype(f"u{size}").type(int.from_bytes(bytes([bits]) * size))


def _span(tensor: Tensor) -> range:
    """Addresses from the first to the last element's end."""
    if not tensor.numel():
        return range(tensor.data_ptr(), tensor.data_ptr())
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return range(tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size())


def _merged(spans: Sequence[range]) -> list[range]:
    """Overlapping spans made one: arguments that share memory share its copy.

    In the order of the arguments, so that an error message does not depend on the allocator.
    """
    merged: list[range] = []
    for span in sorted((span for span in spans if span), key=lambda span: span.start):
        if merged and span.start < merged[-1].stop:
            span = range(merged[-1].start, max(merged.pop().stop, span.stop))
        merged.append(span)
    return sorted(
        merged, key=lambda whole: next(i for i, s in enumerate(spans) if s.start in whole)
    )
