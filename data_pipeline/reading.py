"""Documents of pieces of input files: UTF-8 text, .jsonl and .parquet.

A long document comes in parts of at most PART_BYTES, so memory is bounded by that, by
MAX_LINE_BYTES and MAX_VALUES of a .jsonl line and by the pages of a .parquet file (parquet.py).
"""

import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import zstandard

from data_pipeline.compressed import is_compressed, open_bytes
from data_pipeline.corpus import ROW_SUFFIXES, TEXT_SUFFIXES, Piece, kind, units
from data_pipeline.errors import DataError
from data_pipeline.parquet import damaged, text_rows
from untrusted.errors import UntrustedError
from untrusted.files import open_regular

PART_BYTES = 1 << 20  # one token a byte, encoded, takes a hundred bytes of memory
MAX_LINE_BYTES = 64 << 20
MAX_VALUES = 1 << 21  # of a .jsonl line, which take up to a hundred times their bytes
# what a value of JSON begins with or is followed by: strings whole, also one that is cut off
VALUES = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{,]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or one part of a long one, and the document's name, which does not depend on where
    the corpus lies on disk.

    `num_bytes` is how much text it is, decompressed; `ends`: the document ends with it.
    """

    id: str
    text: str
    num_bytes: int
    ends: bool = True


def documents(inputs: Sequence[Path | str], text_field: str = "text") -> Iterator[Document]:
    """Every non-empty document of `inputs`: files, folders (recursively), globs; long ones in
    parts.

    Folders give their files with a known suffix and skip hidden names; a file that is named itself
    is read whatever its suffix. `text_field` is the field of a .jsonl line, the column of a
    .parquet row.
    Raises DataError for missing inputs, files that are not UTF-8, malformed lines, and when there
    is no document at all.
    """
    found = False
    for unit in units(inputs, unit_bytes=1 << 62):
        for document in unit_documents(unit, text_field):
            found = True
            yield document
    if not found:
        raise empty_corpus(inputs)


def empty_corpus(inputs: Sequence[Path | str]) -> DataError:
    """The error of a corpus without text."""
    given = ", ".join(str(i) for i in inputs) or "nothing"
    return DataError(
        f"The corpus is empty: no text in {given}. Folders are searched for "
        f"{', '.join(sorted(TEXT_SUFFIXES | ROW_SUFFIXES))} files, also with .gz or .zst; name a "
        "file of another suffix itself."
    )


def unit_documents(unit: Sequence[Piece], text_field: str) -> Iterator[Document]:
    """The documents of a unit's pieces, in order. Raises DataError."""
    for piece in unit:
        try:
            if kind(piece.path) == ".jsonl":
                yield from _jsonl_documents(piece, text_field)
            elif kind(piece.path) == ".parquet":
                yield from _parquet_documents(piece, text_field)
            else:
                yield from _text_documents(piece)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{piece.path}: cannot be read ({reason}).") from error
        except UntrustedError as error:
            raise DataError(str(error)) from error


def _text_documents(piece: Piece) -> Iterator[Document]:
    """The file as one document."""
    with open_bytes(piece.path) as file:
        yield from _parts(piece.name, file, piece.path)


def _row_documents(name: str, text: str, num_bytes: int, path: Path) -> Iterator[Document]:
    """The text of a line or row, which is `num_bytes` of input, as one document."""
    if len(text) > PART_BYTES // 4:  # a character is at most 4 bytes
        yield from _parts(name, io.BytesIO(text.encode()), path)
    elif text.strip():
        yield Document(name, text, num_bytes)


def _parts(name: str, file: IO[bytes], path: Path) -> Iterator[Document]:
    """One document of all there is in `file`, which was found in `path`; nothing if it is blank."""
    offset, begun = 0, False
    block = file.read(PART_BYTES)
    while block:
        cut = len(block)
        if cut == PART_BYTES:
            # After the last line; in a text without lines, before the last character.
            cut = block.rfind(b"\n") + 1 or _character_start(block)
        head, rest = block[:cut], block[cut:]
        block = rest + file.read(PART_BYTES - len(rest))
        text = _decode(head, path, offset)
        begun = begun or bool(text.strip())
        if begun:
            yield Document(name, text, len(head), ends=not block)
        offset += cut


def _character_start(block: bytes) -> int:
    """Start of the last UTF-8 character in `block`, which may be incomplete."""
    start = len(block) - 1
    while start > len(block) - 4 and block[start] & 0xC0 == 0x80:
        start -= 1
    return start


def _jsonl_documents(piece: Piece, text_field: str) -> Iterator[Document]:
    """One document a line, named by its first byte; blank lines are skipped."""
    path = piece.path
    with open_bytes(path) as file:
        offset = piece.start
        if offset:  # the line that begins before belongs to the piece before
            file.seek(offset - 1)
            offset += len(_read_line(file, path, offset - 1)) - 1
        whole = is_compressed(path)
        while whole or offset < piece.end:
            line = _read_line(file, path, offset)
            if not line:
                return
            text = _decode(line, path, offset)
            if text.strip():
                value = _field(text, text_field, path, offset)
                yield from _row_documents(f"{piece.name}@{offset}", value, len(line), path)
            offset += len(line)


def _read_line(file: IO[bytes], path: Path, offset: int) -> bytes:
    """The rest of the line at byte `offset`."""
    line = file.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise DataError(
            f"{_line(path, offset)}: the line is longer than {MAX_LINE_BYTES} bytes; split the "
            "document over several lines, or make it a text file of its own."
        )
    return line


def _parquet_documents(piece: Piece, text_field: str) -> Iterator[Document]:
    """One document a row, named by its number in the file; empty ones and nulls are skipped."""
    path = piece.path
    groups = None if is_compressed(path) else range(piece.start, piece.end)
    with _seekable(path) as content:
        for row, value in text_rows(content, path, text_field, groups):
            name = f"{piece.name}@{row}"
            if value.size > PART_BYTES:
                yield from _parts(name, io.BytesIO(value), path)
            elif value.size:
                try:
                    text = str(value, "utf-8")
                except UnicodeDecodeError as error:
                    raise damaged(path, error) from error
                yield from _row_documents(name, text, value.size, path)


def _seekable(path: Path) -> IO[bytes]:
    """The file; what is compressed is unpacked into a temporary one, gone when it is closed."""
    if not is_compressed(path):
        return open_regular(path, follow_link=True)
    unpacked = tempfile.TemporaryFile(prefix="transxssm-prepare.")  # noqa: SIM115, the caller's
    try:
        with open_bytes(path) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.seek(0)
    except BaseException:
        unpacked.close()
        raise
    return unpacked


def _line(path: Path, offset: int) -> str:
    """file:line of a byte, for errors."""
    number = 1
    with open_bytes(path) as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            number += block.count(b"\n")
            offset -= len(block)
    return f"{path}:{number}"


def _field(line: str, text_field: str, path: Path, offset: int) -> str:
    """The text of one .jsonl line, which begins at a byte of the file."""
    if len(line) > MAX_VALUES and any(islice(VALUES.finditer(line), MAX_VALUES, None)):
        raise DataError(
            f"{_line(path, offset)}: the line has more than {MAX_VALUES:,} values; leave out the "
            f"fields that are not its text, {text_field!r}."
        )
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of an integer of too many digits
        raise DataError(
            f"{_line(path, offset)}: not valid JSON ({error}). Every line must be one JSON object."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{_line(path, offset)}: a JSON {type(row).__name__}, not an object with fields."
        )
    if text_field not in row:
        fields = ", ".join(row) or "none"
        raise DataError(
            f"{_line(path, offset)}: no field {text_field!r} (fields: {fields}). Name the text's "
            "field with --text-field."
        )
    value = row[text_field]
    if not isinstance(value, str):
        raise DataError(
            f"{_line(path, offset)}: field {text_field!r} is {type(value).__name__}, not a string."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{_line(path, offset)}: field {text_field!r} holds half of a surrogate pair at "
            f"character {error.start}, which is no Unicode text; mend or drop the line."
        ) from error
    return value


def _decode(block: bytes, path: Path, offset: int) -> str:
    """`block`, which starts at byte `offset` of `path`, as text without a byte order mark."""
    try:
        return block.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{path}: not UTF-8 at byte {at} (0x{block[error.start]:02x}). Convert it, for example "
            f"`iconv -f LATIN1 -t UTF-8 {path.name} > fixed.txt`, with its real encoding after -f, "
            "or leave the file out."
        ) from error
