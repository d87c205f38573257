"""Thrift's compact protocol, as Parquet describes itself in it: chosen fields of structures.

Every function takes data and the byte where a value begins, and returns the byte after it. Each
raises IndexError where the value goes on after the data, ThriftError for what is no such value.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

MAX_DEPTH = 16  # of structures in structures
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

Reader = Callable[[bytes, int, int], tuple[Any, int]]
"""Reads a value of a kind: (data, at, kind) → (value, the byte after it)."""


class ThriftError(ValueError):
    """Bytes that are no value of the protocol."""


def struct(data: bytes, at: int, readers: Mapping[int, Reader]) -> tuple[dict[int, Any], int]:
    """The fields of a structure that there are readers for, by number."""
    values: dict[int, Any] = {}
    field = 0
    while data[at]:
        kind, field, at = _field(data, at, field)
        if field in readers:
            values[field], at = readers[field](data, at, kind)
        else:
            at = skip(data, at, kind)
    return values, at + 1


def integer(data: bytes, at: int, kind: int) -> tuple[int, int]:
    """A number of 16, 32 or 64 bits."""
    _check(kind, (I16, I32, I64), "an integer")
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def binary(data: bytes, at: int, kind: int) -> tuple[bytes, int]:
    """Bytes, as of a text."""
    _check(kind, (BINARY,), "bytes")
    length, at = _varint(data, at)
    if at + length > len(data):
        raise IndexError
    return data[at : at + length], at + length


def struct_of(readers: Mapping[int, Reader]) -> Reader:
    """A reader of structures [see struct]."""

    def read(data: bytes, at: int, kind: int) -> tuple[dict[int, Any], int]:
        _check(kind, (STRUCT,), "a structure")
        return struct(data, at, readers)

    return read


def list_of(reader: Reader, only: Collection[int] | None = None) -> Reader:
    """A reader of lists, of what `reader` reads.

    only: the numbers of the values to read [all]; the others are None.
    """

    def read(data: bytes, at: int, kind: int) -> tuple[list[Any], int]:
        count, of, at = items(data, at, kind)
        values: list[Any] = []
        for number in range(count):
            value = None
            if only is None or number in only:
                value, at = reader(data, at, of)
            else:
                at = _skip_items(data, at, 1, [of], 0)
            values.append(value)
        return values, at

    return read


def items(data: bytes, at: int, kind: int) -> tuple[int, int, int]:
    """How many values a list has, their kind, and the byte where the first begins."""
    _check(kind, (LIST, SET), "a list")
    count, of = data[at] >> 4, data[at] & 15
    if count < 15:
        return count, of, at + 1
    count, at = _varint(data, at + 1)
    return count, of, at


def _check(kind: int, kinds: Sequence[int], name: str) -> None:
    if kind not in kinds:
        raise ThriftError(f"a value has the kind {kind}, not that of {name}")


def _field(data: bytes, at: int, last: int) -> tuple[int, int, int]:
    """Kind and number of the field at a byte, and the byte after them."""
    step, kind = data[at] >> 4, data[at] & 15
    if step:
        return kind, last + step, at + 1
    number, at = integer(data, at + 1, I16)
    return kind, number, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
        if shift > 63:
            raise ThriftError("a number is too long")


def skip(data: bytes, at: int, kind: int, depth: int = 0) -> int:
    """The byte after a value."""
    if depth > MAX_DEPTH:
        raise ThriftError("a structure is too deep")
    if kind in (TRUE, FALSE):
        return at
    if kind in (I16, I32, I64):
        while data[at] > 127:
            at += 1
        return at + 1
    if kind == BINARY:
        length = data[at]
        if length < 128:
            return at + 1 + length
        length, at = _varint(data, at)
        return at + length
    if kind in (LIST, SET):
        count, of, at = items(data, at, kind)
        return _skip_items(data, at, count, [of], depth)
    if kind == MAP:
        count, at = _varint(data, at)
        if not count:
            return at
        return _skip_items(data, at + 1, count, [data[at] >> 4, data[at] & 15], depth)
    if kind == STRUCT:
        while head := data[at]:
            at = at + 1 if head > 15 else skip(data, at + 1, I16)
            at = skip(data, at, head & 15, depth + 1)
        return at + 1
    if kind in (BYTE, DOUBLE):
        return at + (1 if kind == BYTE else 8)
    raise ThriftError(f"a value has the kind {kind}")


def _skip_items(data: bytes, at: int, count: int, kinds: Sequence[int], depth: int) -> int:
    for _ in range(count):
        for kind in kinds:
            at = skip(data, at, BYTE if kind in (TRUE, FALSE) else kind, depth + 1)
            data[at - 1]  # IndexError at the end of the data, rather than `count` times
    return at
