"""Text of Parquet files, in memory that is bounded whatever the files say.

A page is decompressed as a whole, and a value is no longer than the largest page of its column,
however few bytes of the file say so. So the sizes in front of the pages are read first; then as
many rows are decoded at a time as even such values leave room for.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import DataError
from data_pipeline.thrift import binary, integer, items, list_of, skip, struct, struct_of

BATCH_ROWS, BATCH_BYTES = 1 << 16, 1 << 26
MAX_PAGE_BYTES = 1 << 29  # usual are 1 MiB; pyarrow puts 1024 rows, however long, into one
HEADER_BYTES, MAX_HEADER_BYTES = 1 << 10, 1 << 24
FOOTER_TAIL = 8  # bytes at the end of a file: the footer's length, and what says that it is Parquet
BUFFER_BYTES = 1 << 20


def text_rows(
    content: IO[bytes],
    path: Path,
    column: str,
    groups: range | None,
    strict: bool,
    empty: Counter[str],
) -> Iterator[tuple[int, Any]]:
    """The number in the file and the bytes (a pyarrow.Buffer) of each row that is not null.

    column: its name, or the path to a field of a struct (`content.text`). groups: row groups to
    read [all]; path: for messages. Nulls are counted in empty["null"], and an error if `strict`.
    Raises DataError for a damaged file, one without such a column of text, and one with pages too
    large to be decoded.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.compute  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(
            content, buffer_size=BUFFER_BYTES, pre_buffer=False
        ) as file:
            names = _column_path(file.schema_arrow, column, path)
            groups = range(file.num_row_groups) if groups is None else groups
            if groups.stop > file.num_row_groups:
                raise _FooterError("it has fewer row groups than when it was first read")
            dotted = ".".join(names)
            leaves = [n for n in range(len(file.schema)) if file.schema.column(n).path == dotted]
            if len(leaves) > 1:
                raise DataError(f"{path}: {len(leaves)} columns {dotted!r}; leave one of them.")
            row, chunks = 0, _chunks(content, dotted, leaves)
            for group, (num_rows, chunk) in zip(range(groups.stop), chunks, strict=False):
                if group not in groups:
                    row += num_rows
                    continue
                largest = _largest_page(content, path, column, chunk)
                rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))
                for batch in file.iter_batches(rows, [group], [dotted]):
                    values = _plain_values(batch, names)
                    if strict and values.null_count:
                        null = pyarrow.compute.index(values.is_null(), True).as_py()
                        raise DataError(
                            f"{path}: column {column!r} is null in row {row + null}; drop such "
                            "rows, or leave out --strict to skip them."
                        )
                    empty["null"] += values.null_count
                    for number in pyarrow.compute.indices_nonzero(values.is_valid()).to_pylist():
                        yield row + number, values[number].as_buffer()
                    row += batch.num_rows
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise damaged(path, error) from error  # of names that are no UTF-8, among others


def damaged(path: Path, error: Exception) -> DataError:
    """The error of a file that cannot be decoded."""
    return DataError(f"{path}: damaged ({error}); copy or write it again.")


def _column_path(schema: Any, column: str, path: Path) -> list[str]:
    """Names that lead to a column of text: [its own], or those of structs before it.

    A column whose name has dots comes before a field of that path. Raises DataError.
    """
    import pyarrow

    names = _resolved(schema, column)
    if names is None:
        raise DataError(
            f"{path}: no column {column!r} (columns: {', '.join(schema.names)}). Name the text's "
            "column with --text-field."
        )
    if (count := schema.names.count(names[0])) > 1:
        raise DataError(f"{path}: {count} columns {names[0]!r}; leave one of them.")
    kind = schema.field(names[0]).type
    for name in names[1:]:
        kind = kind.field(name).type
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    readable = (
        types.is_string, types.is_large_string, types.is_string_view,
        types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null,
    )  # fmt: skip
    if not any(is_of_kind(kind) for is_of_kind in readable):
        nested = ""
        if types.is_struct(kind):
            fields = ", ".join(f"{column}.{field.name}" for field in kind)
            nested = f" Name one of its fields with --text-field: {fields}."
        raise DataError(f"{path}: column {column!r} is {kind}, not a string.{nested}")
    return names


def _resolved(fields: Any, column: str) -> list[str] | None:
    """The names that `column` consists of in a schema or struct type; None if there is no such."""
    import pyarrow

    have = {field.name: field.type for field in fields}
    if column in have:
        return [column]
    parts = column.split(".")
    for cut in range(1, len(parts)):
        name, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
        if name in have and pyarrow.types.is_struct(have[name]):
            names = _resolved(have[name], rest)
            if names is not None:
                return [name, *names]
    return None


def _plain_values(batch: Any, names: Sequence[str]) -> Any:
    """A column's values as an array of strings or bytes."""
    import pyarrow

    values = batch.column(names[0])
    for name in names[1:]:  # null where a struct around it is
        values = pyarrow.compute.struct_field(values, [name])
    if isinstance(values, pyarrow.ExtensionArray):
        values = values.storage
    if isinstance(values, pyarrow.DictionaryArray):  # as many rows as room is for its values
        values = values.dictionary_decode()
    return values


# -- read here: pyarrow ends the process over some damage ------------------------------------------


class _FooterError(ValueError):
    """What a file or a page says of itself is damaged."""


# of Parquet's ColumnMetaData: path, bytes, first data page, dictionary
PATH, NUM_BYTES, DATA, DICTIONARY = 3, 7, 9, 11
CHUNK = {PATH: list_of(binary), NUM_BYTES: integer, DATA: integer, DICTIONARY: integer}
COLUMN = struct_of({3: struct_of(CHUNK)})
COLUMNS, NUM_ROWS = 1, 3  # of RowGroup
GROUPS = 4  # of FileMetaData


def _chunks(
    content: IO[bytes], column: str, leaves: Sequence[int]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Rows of each row group, and the bytes [begin, end) of the file that have its column.

    column: its name, after those of structs around it and dots; leaves: the numbers that it may
    have. Raises _FooterError, ThriftError.
    """
    try:
        yield from _described(_footer(content), column, leaves)
    except IndexError:
        raise _FooterError("the footer is cut off") from None


def _footer(content: IO[bytes]) -> bytes:
    """What describes the file, at its end. pyarrow has found it to be in the file."""
    size = os.fstat(content.fileno()).st_size
    length = int.from_bytes(os.pread(content.fileno(), 4, size - FOOTER_TAIL), "little")
    return os.pread(content.fileno(), length, size - FOOTER_TAIL - length)


def _described(
    footer: bytes, column: str, leaves: Sequence[int]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """[see _chunks] Row groups are read one by one: there may be very many."""
    at = 0
    found, _ = struct(
        footer, 0, {GROUPS: lambda data, at, kind: ((at, kind), skip(data, at, kind))}
    )
    if GROUPS not in found:
        raise _FooterError("the footer has no row groups")
    count, kind, at = items(footer, *found[GROUPS])
    read = struct_of({COLUMNS: list_of(COLUMN, leaves), NUM_ROWS: integer})
    for number in range(count):
        group, at = read(footer, at, kind)
        columns = group.get(COLUMNS, [])
        chunks = [columns[leaf].get(3, {}) for leaf in leaves if leaf < len(columns)]
        chunks = [chunk for chunk in chunks if b".".join(chunk.get(PATH, ())) == column.encode()]
        if len(chunks) != 1 or not {NUM_BYTES, DATA} <= chunks[0].keys() or NUM_ROWS not in group:
            raise _FooterError(f"row group {number} does not say where column {column!r} is")
        (chunk,) = chunks
        begin = min(chunk.get(DICTIONARY) or chunk[DATA], chunk[DATA])
        yield group[NUM_ROWS], (begin, begin + chunk[NUM_BYTES])


def _largest_page(content: IO[bytes], path: Path, column: str, chunk: tuple[int, int]) -> int:
    """Bytes of the largest page in bytes [begin, end) of the file, decompressed. Raises
    DataError, _FooterError, ThriftError."""
    at, end = chunk
    if at < 0:
        raise _FooterError(f"column {column!r} begins before the file")
    end, largest = min(end, os.fstat(content.fileno()).st_size), 0
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
                raise _FooterError("the header of a page is cut off") from None
            length *= 4


def _page_header(data: bytes) -> tuple[int, int, int]:
    """[see _page_at] Raises IndexError where it goes on after `data`."""
    sizes, size = struct(data, 0, {2: integer, 3: integer})
    if min(sizes.get(2, -1), sizes.get(3, -1)) < 0:
        raise _FooterError("the header of a page lacks sizes")
    return sizes[2], sizes[3], size
