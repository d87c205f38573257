"""Documents of pieces of input files: UTF-8 text, JSON lines and .parquet.

A long document comes in parts of at most PART_BYTES, so memory is bounded by that, by
MAX_LINE_BYTES and MAX_VALUES of a line of JSON and by the pages of a .parquet file (parquet.py).
"""

import io
import json
import logging
import re
import shlex
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import zstandard

from data_pipeline.compressed import GZIP_SUFFIXES, is_compressed, open_bytes
from data_pipeline.corpus import LINE_SUFFIXES, ROW_SUFFIXES, TEXT_SUFFIXES, Piece, kind, units
from data_pipeline.errors import DataError
from data_pipeline.fields import NoText, field_names, find_field
from data_pipeline.parquet import text_rows
from data_pipeline.sections import Section, Separator, sections
from untrusted.errors import UntrustedError
from untrusted.files import open_regular

PART_BYTES = 1 << 20  # one token a byte, encoded, takes a hundred bytes of memory
MAX_LINE_BYTES = 64 << 20
MAX_VALUES = 1 << 21  # of a line of JSON, which take up to a hundred times their bytes
FIRST_ROWS = 1000  # of an input, one of which has to have the field of the text
# what a value of JSON begins with or is followed by: strings whole, also one that is cut off
VALUES = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{,]', re.DOTALL)

# First bytes of files that are not UTF-8 text, and what to do with them.
BEGINNINGS = {
    b"\xff\xfe": "it is UTF-16: `iconv -f UTF-16 -t UTF-8 {name} > fixed{suffix}`",
    b"\xfe\xff": "it is UTF-16: `iconv -f UTF-16 -t UTF-8 {name} > fixed{suffix}`",
    b"\x1f\x8b": "it is compressed by gzip: rename it to {name}.gz",
    b"\x28\xb5\x2f\xfd": "it is compressed by Zstandard: rename it to {name}.zst",
}

TextField = str | Sequence[str]
"""The field that is the text, of a row in any input, or one for each input."""

log = logging.getLogger("transxssm")


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


def documents(
    inputs: Sequence[Path | str],
    text_field: TextField = "text",
    *,
    separator: str = "",
    strict: bool = False,
) -> Iterator[Document]:
    """Every non-empty document of `inputs`: files, folders (recursively), globs; long ones in
    parts.

    Folders give their files with a known suffix and skip hidden names; a file that is named itself
    is read whatever its suffix. `text_field` is the field of a JSON line, the column of a .parquet
    row; dots lead into nested ones. `separator` cuts text files into documents [see Separator].
    Rows without text are counted in a warning at the end; if `strict`, the first is an error.
    Raises DataError for missing inputs, files that are not UTF-8, malformed lines, and when there
    is no document at all.
    """
    check_text_field(text_field, inputs)
    pieces = [piece for unit in units(inputs, unit_bytes=1 << 62) for piece in unit]
    check_first_rows(pieces, text_field)
    found = False
    empty: Counter[str] = Counter()
    for document in unit_documents(
        pieces, text_field, separator=separator, strict=strict, empty=empty
    ):
        found = True
        yield document
    if not found:
        raise empty_corpus(inputs)
    if rows := empty.total():
        log.warning("%s", empty_rows_message(rows))


def empty_rows_message(rows: int) -> str:
    """The report of rows without text."""
    are = "1 row has" if rows == 1 else f"{rows:,} rows have"
    return f"{are} no text (null, missing or blank) and became no document"


def empty_corpus(inputs: Sequence[Path | str]) -> DataError:
    """The error of a corpus without text."""
    given = ", ".join(str(i) for i in inputs) or "nothing"
    return DataError(
        f"The corpus is empty: no text in {given}. Folders are searched for "
        f"{', '.join(sorted(TEXT_SUFFIXES | ROW_SUFFIXES))} files, also with .gz or .zst; name a "
        "file of another suffix itself."
    )


def check_text_field(text_field: TextField, inputs: Sequence[Path | str]) -> None:
    """Raise DataError unless there is one field, or one for each input."""
    fields = [text_field] if isinstance(text_field, str) else list(text_field)
    if len(fields) not in (1, len(inputs)):
        raise DataError(
            f"{len(fields)} text fields ({', '.join(fields)}) for {len(inputs)} inputs; give "
            "--text-field once for all, or once for each input, in their order."
        )
    if not all(fields):
        raise DataError("--text-field is empty; give the name of the field that holds the text.")


def _field_of(piece: Piece, text_field: TextField) -> str:
    """The field of the text in a piece's rows."""
    if isinstance(text_field, str):
        return text_field
    return text_field[piece.input_number if len(text_field) > 1 else 0]


def check_first_rows(pieces: Iterable[Piece], text_field: TextField) -> None:
    """Raise DataError if none of the first rows of an input's JSON lines has the text's field:
    the name is wrong then, and all of them would count as rows without text."""
    lines = (piece for piece in pieces if kind(piece.path) in LINE_SUFFIXES)
    for _, of_input in groupby(lines, lambda piece: piece.input_number):
        missing: list[tuple[Path, str, dict[str, Any]]] = []
        for path, field, row in islice(_rows(of_input, text_field), FIRST_ROWS):
            if find_field(row, field) is not NoText.MISSING:
                break
            missing.append((path, field, {} if missing else row))
        else:
            for path, field, row in missing[:1]:
                rows = "its only row" if len(missing) == 1 else f"its first {len(missing):,} rows"
                raise DataError(
                    f"{path}: no field {field!r} (fields: {field_names(row)}) in {rows}. Name the "
                    f"text's field with --text-field.{_rows_within(row, path)}"
                )


def _rows_within(row: dict[str, Any], path: Path) -> str:
    """Return a hint for a file that is one object around a list of rows, or ""."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            command = _by_jq(path, f".{json.dumps(name)}[]")
            return (
                f" Its field {name!r} is a list of {len(value):,} objects: if those are the rows, "
                f"write one a line, as `{command}` does."
            )
    return ""


def _rows(pieces: Iterable[Piece], text_field: TextField) -> Iterator[tuple[Path, str, Any]]:
    """Path, name of the text's field, and fields, of every row of JSON lines."""
    for piece in pieces:
        field = _field_of(piece, text_field)
        with _errors_of(piece.path):
            for _, _, row in _json_rows(piece, field):
                yield piece.path, field, row


def unit_documents(
    unit: Sequence[Piece],
    text_field: TextField,
    *,
    separator: str = "",
    strict: bool = False,
    empty: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of a unit's pieces, in order. Raises DataError.

    text_field, separator, strict: see documents. empty: counts rows without text, by the reason.
    """
    empty = Counter() if empty is None else empty
    between = Separator(separator) if separator else None
    for piece in unit:
        field = _field_of(piece, text_field)
        with _errors_of(piece.path):
            if kind(piece.path) in LINE_SUFFIXES:
                yield from _line_documents(piece, field, strict, empty)
            elif kind(piece.path) == ".parquet":
                yield from _parquet_documents(piece, field, strict, empty)
            else:
                yield from _text_documents(piece, field, between)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn errors of reading and decompressing a file into DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}).") from error
    except UntrustedError as error:
        raise DataError(str(error)) from error


def _text_documents(
    piece: Piece, text_field: str, separator: Separator | None
) -> Iterator[Document]:
    """The file as one document, or one for each section, named by its first byte."""
    with open_bytes(piece.path) as file:
        if separator is not None:
            for section in sections(file, separator):
                name = f"{piece.name}@{section.offset}"
                yield from _parts(name, section, piece.path, section.offset)
            return
        for number, part in enumerate(_parts(piece.name, file, piece.path)):
            if number == 0:
                _check_no_rows(part.text, text_field, piece.path)
            yield part


def _check_no_rows(text: str, text_field: str, path: Path) -> None:
    """Raise DataError, or warn where the name says that it is text, for a file of JSON lines."""
    line = text[: MAX_LINE_BYTES >> 6].lstrip().partition("\n")[0]
    if not line.startswith("{"):
        return
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(find_field(row, text_field), str):
        return
    message = (
        f"{path}: holds rows of JSON (field {text_field!r}), but its name does not end with .jsonl "
        "or .json, so that it would be one document with all the JSON in it"
    )
    if kind(path) not in TEXT_SUFFIXES:
        raise DataError(f"{message}; rename it.")
    log.warning("%s: that is what it becomes; rename it if the rows are meant", message)


def _row_documents(name: str, text: str, num_bytes: int, path: Path) -> Iterator[Document]:
    """The text of a line or row, which is `num_bytes` of input, as one document."""
    if len(text) > PART_BYTES // 4:  # a character is at most 4 bytes
        yield from _parts(name, io.BytesIO(text.encode()), path)
    elif text.strip():
        yield Document(name, text, num_bytes)


def _parts(name: str, file: IO[bytes] | Section, path: Path, begin: int = 0) -> Iterator[Document]:
    """One document of all there is in `file`, which was found in `path` at byte `begin`; nothing
    if it is blank."""
    offset, begun = 0, False
    block = file.read(PART_BYTES)
    while block:
        cut = len(block)
        if cut == PART_BYTES:
            # After the last line; in a text without lines, before the last character.
            cut = block.rfind(b"\n") + 1 or _character_start(block)
        head, rest = block[:cut], block[cut:]
        block = rest + file.read(PART_BYTES - len(rest))
        text = _decode(head, path, begin + offset)
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


def _line_documents(
    piece: Piece, text_field: str, strict: bool, empty: Counter[str]
) -> Iterator[Document]:
    """One document a line, named by its first byte; blank lines are skipped, rows without text
    counted."""
    for offset, num_bytes, row in _json_rows(piece, text_field):
        text = _field(row, text_field, piece.path, offset, strict)
        if isinstance(text, NoText):
            empty[text.value] += 1
        elif not text.strip():
            empty["blank"] += 1
        else:
            yield from _row_documents(f"{piece.name}@{offset}", text, num_bytes, piece.path)


def _json_rows(piece: Piece, text_field: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """First byte, number of bytes and fields of each line that is not blank."""
    path = piece.path
    with open_bytes(path) as file:
        offset = piece.start
        if offset:  # the line that begins before belongs to the piece before
            file.seek(offset - 1)
            offset += len(_read_line(file, path, offset - 1)) - 1
        whole, is_first = is_compressed(path), offset == 0
        while whole or offset < piece.end:
            line = _read_line(file, path, offset, is_first=is_first)
            if not line:
                return
            text = _decode(line, path, offset)
            if text.strip():
                is_first = False
                yield offset, len(line), _row(text, text_field, path, offset)
            offset += len(line)


def _read_line(file: IO[bytes], path: Path, offset: int, *, is_first: bool = False) -> bytes:
    """The rest of the line at byte `offset`; is_first: with nothing but blank lines before it."""
    line = file.readline(MAX_LINE_BYTES)
    if is_first and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(
            f"{path}: is a JSON array. Rows have to be one JSON object a line, for example as "
            f"`{_by_jq(path, '.[]')}` writes them."
        )
    if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise DataError(
            f"{_line(path, offset)}: the line is longer than {MAX_LINE_BYTES} bytes; split the "
            "document over several lines, or make it a text file of its own."
        )
    return line


def _by_jq(path: Path, program: str) -> str:
    """A command that writes JSON as one value a line."""
    program = program.replace("'", "'\\''")
    plain = path.with_suffix("") if is_compressed(path) else path
    result = plain.with_suffix(".rows.jsonl" if plain.suffix == ".jsonl" else ".jsonl")
    source, target = shlex.quote(str(path)), shlex.quote(str(result))
    if not is_compressed(path):
        return f"jq -c '{program}' {source} > {target}"
    unpack = "gzip" if path.suffix.lower() in GZIP_SUFFIXES else "zstd"
    return f"{unpack} -dc {source} | jq -c '{program}' > {target}"


def _parquet_documents(
    piece: Piece, text_field: str, strict: bool, empty: Counter[str]
) -> Iterator[Document]:
    """One document a row, named by its number in the file; empty ones and nulls are counted."""
    path = piece.path
    groups = None if is_compressed(path) else range(piece.start, piece.end)
    with _seekable(path) as content:
        for row, value in text_rows(content, path, text_field, groups, strict, empty):
            name = f"{piece.name}@{row}"
            if value.size > PART_BYTES:
                yield from _parts(name, io.BytesIO(value), path)
                continue
            try:
                text = str(value, "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: column {text_field!r} of row {row} is not UTF-8 text ({error.reason} "
                    f"at byte {error.start}). Name another column with --text-field, or convert it."
                ) from error
            if text.strip():
                yield from _row_documents(name, text, value.size, path)
            else:
                empty["blank"] += 1


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


def _row(line: str, text_field: str, path: Path, offset: int) -> dict[str, Any]:
    """The fields of one line of JSON, which begins at a byte of the file."""
    if len(line) > MAX_VALUES and any(islice(VALUES.finditer(line), MAX_VALUES, None)):
        raise DataError(
            f"{_line(path, offset)}: the line has more than {MAX_VALUES:,} values; leave out the "
            f"fields that are not its text, {text_field!r}."
        )
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of an integer of too many digits
        raise DataError(
            f"{_line(path, offset)}: not valid JSON ({error}). Every line must be one JSON object, "
            f"as `{_by_jq(path, '.')}` writes them; leave out the file if it holds no rows."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{_line(path, offset)}: a JSON {type(row).__name__}, not an object with fields."
        )
    return row


def _field(
    row: dict[str, Any], text_field: str, path: Path, offset: int, strict: bool
) -> str | NoText:
    """The text of a row, or why it has none. Raises DataError, also for that if `strict`."""
    value = find_field(row, text_field)
    if isinstance(value, NoText):
        if strict and value is NoText.MISSING:
            raise DataError(
                f"{_line(path, offset)}: no field {text_field!r} (fields: {field_names(row)}). "
                "Name the text's field with --text-field, or leave out --strict to skip such rows."
            )
        if strict:
            raise DataError(
                f"{_line(path, offset)}: field {text_field!r} is null; drop the line, or leave out "
                "--strict to skip such rows."
            )
        return value
    if not isinstance(value, str):
        raise DataError(
            f"{_line(path, offset)}: field {text_field!r} is {type(value).__name__}, not a string."
            f"{_instead(value, text_field, path)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{_line(path, offset)}: field {text_field!r} holds half of a surrogate pair at "
            f"character {error.start}, which is no Unicode text; mend or drop the line."
        ) from error
    return value


def _instead(value: Any, text_field: str, path: Path) -> str:
    """Return a hint for a text field that holds fields or a list, or ""."""
    if isinstance(value, dict) and value:
        fields = ", ".join(f"{text_field}.{name}" for name in [*value][:20])
        return f" Name one of its fields with --text-field: {fields}."
    if isinstance(value, list) and value:
        at = "." + ".".join(json.dumps(name) for name in text_field.split("."))
        first = value[0] if isinstance(value[0], dict) else {}
        names = [name for name in first if isinstance(first[name], str)]
        text = max(names, key=lambda name: len(first[name]), default="")  # rather than its role
        item = f"{at}[].{json.dumps(text)}" if text else f"{at}[]"
        command = _by_jq(path, f'{{text: [{item}] | join("\\n")}}')
        return f" To have its parts as one text, `{command}`."
    return ""


def _decode(block: bytes, path: Path, offset: int) -> str:
    """`block`, which starts at byte `offset` of `path`, as text without a byte order mark."""
    try:
        return block.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
    except UnicodeDecodeError as error:
        remedies = [r for beginning, r in BEGINNINGS.items() if block.startswith(beginning)]
        if remedies and offset == 0:
            remedy = remedies[0].format(name=path.name, suffix=path.suffix)
            raise DataError(f"{path}: not UTF-8; {remedy}.") from error
        at = offset + error.start
        raise DataError(
            f"{path}: not UTF-8 at byte {at} (0x{block[error.start]:02x}). Convert it, for example "
            f"`iconv -f LATIN1 -t UTF-8 {path.name} > fixed.txt`, with its real encoding after -f, "
            "or leave the file out."
        ) from error
