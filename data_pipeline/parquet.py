"""Text of Parquet files, in memory that is bounded whatever the files say.

A page is decompressed as a whole, and a value is no longer than the largest page of its column,
however few bytes of the file say so. So the sizes in front of the pages are read first; then as
many rows are decoded at a time as even such values leave room for.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import DataError

BATCH_ROWS, BATCH_BYTES = 256, 1 << 26
MAX_PAGE_BYTES = 1 << 29  # usual are 1 MiB; pyarrow puts 1024 rows, however long, into one
HEADER_BYTES, MAX_HEADER_BYTES = 1 << 10, 1 << 24
MAX_DEPTH = 16  # of a header's structures
BUFFER_BYTES = 1 << 20


def text_rows(
    content: IO[bytes], path: Path, column: str, groups: range | None
) -> Iterator[tuple[int, Any]]:
    """The number in the file and the UTF-8 bytes (a pyarrow.Buffer) of each row that is not null.

    groups: row groups to read [all]; path: for messages. Raises DataError for a damaged file,
    one without such a column of text, and one with pages too large to be decoded.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(
            content, buffer_size=BUFFER_BYTES, pre_buffer=False
        ) as file:
            _check_column(file, column, path)
            groups = range(file.num_row_groups) if groups is None else groups
            row = sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
            for group in groups:
                largest = _largest_page(content, path, column, file.metadata.row_group(group))
                rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))
                for batch in file.iter_batches(rows, [group], [column]):
                    for number, value in enumerate(batch.column(0), row):
                        if value.is_valid:
                            yield number, value.as_buffer()
                    row += batch.num_rows
    except (pyarrow.ArrowException, _HeaderError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """The error of a file that cannot be decoded."""
    return DataError(f"{path}: damaged ({error}); copy or write it again.")


def _check_column(file: Any, column: str, path: Path) -> None:
    """Raises DataError if a Parquet file has no such column of text."""
    import pyarrow

    names = file.schema_arrow.names
    if column not in names:
        raise DataError(
            f"{path}: no column {column!r} (columns: {', '.join(names)}). Name the text's "
            "column with --text-field."
        )
    if names.count(column) > 1:
        raise DataError(f"{path}: {names.count(column)} columns {column!r}; leave one of them.")
    kind = file.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column {column!r} is {kind}, not a string.")


# -- pages ---------------------------------------------------------------------------------------


class _HeaderError(ValueError):
    """What stands in front of a page cannot be read."""


def _largest_page(content: IO[bytes], path: Path, column: str, group: Any) -> int:
    """Bytes of the largest page of a column in a row group, decompressed. Raises DataError."""
    chunk = next(
        chunk
        for chunk in map(group.column, range(group.num_columns))
        if chunk.path_in_schema == column
    )
    starts = (chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    at, largest = min(starts), 0
    end = min(at + chunk.total_compressed_size, os.fstat(content.fileno()).st_size)
    while at < end:
        size, packed_size, header_size = _page_at(content.fileno(), at)
        largest = max(largest, size)
        if largest > MAX_PAGE_BYTES:
            raise DataError(
                f"{path}: a page of column {column!r} has {size:,} bytes, more than the "
                f"{MAX_PAGE_BYTES:,} that are read at once; write the file with smaller pages "
                "(data_page_size), or texts so long as files of their own."
            )
        at += header_size + packed_size
    return largest


def _page_at(file: int, at: int) -> tuple[int, int, int]:
    """Bytes of the page at a byte of the file: decompressed, as stored, and of its header."""
    length = HEADER_BYTES
    while True:
        data = os.pread(file, length, at)
        try:
            return _page_header(data)
        except IndexError:
            if len(data) < length or length >= MAX_HEADER_BYTES:
                raise _HeaderError("the header of a page is cut off") from None
            length *= 4


def _page_header(data: bytes) -> tuple[int, int, int]:
    """[see _page_at] Of Thrift's compact protocol: field 2 and 3 of the structure. Raises
    IndexError where it goes on after `data`, _HeaderError for what is no such structure."""
    sizes = {2: -1, 3: -1}
    at, field = 0, 0
    while data[at]:
        kind, field, at = _field(data, at, field)
        if field in sizes and kind == I32:
            sizes[field], at = _integer(data, at)
        else:
            at = _after(data, at, kind, 0)
    if min(sizes.values()) < 0:
        raise _HeaderError("the header of a page lacks sizes")
    return sizes[2], sizes[3], at + 1


TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


def _field(data: bytes, at: int, last: int) -> tuple[int, int, int]:
    """Kind and number of the field at a byte, and the byte after them."""
    step, kind = data[at] >> 4, data[at] & 15
    if step:
        return kind, last + step, at + 1
    number, at = _integer(data, at + 1)
    return kind, number, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
        if shift > 63:
            raise _HeaderError("a number in the header of a page is too long")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _after(data: bytes, at: int, kind: int, depth: int) -> int:
    """The byte after a value."""
    if depth > MAX_DEPTH:
        raise _HeaderError("the header of a page is too deep")
    if kind in (TRUE, FALSE):
        return at
    if kind in (I16, I32, I64):
        return _varint(data, at)[1]
    if kind == BINARY:
        length, at = _varint(data, at)
        return at + length
    if kind in (LIST, SET):
        count, of = data[at] >> 4, data[at] & 15
        count, at = _varint(data, at + 1) if count == 15 else (count, at + 1)
        return _after_items(data, at, count, [of], depth)
    if kind == MAP:
        count, at = _varint(data, at)
        if not count:
            return at
        return _after_items(data, at + 1, count, [data[at] >> 4, data[at] & 15], depth)
    if kind == STRUCT:
        field = 0
        while data[at]:
            of, field, at = _field(data, at, field)
            at = _after(data, at, of, depth + 1)
        return at + 1
    if kind in (BYTE, DOUBLE):
        return at + (1 if kind == BYTE else 8)
    raise _HeaderError(f"the header of a page has a value of kind {kind}")


def _after_items(data: bytes, at: int, count: int, kinds: Sequence[int], depth: int) -> int:
    for _ in range(count):
        for kind in kinds:
            at = _after(data, at, BYTE if kind in (TRUE, FALSE) else kind, depth + 1)
            data[at - 1]  # IndexError at the end of the data, rather than `count` times
    return at
