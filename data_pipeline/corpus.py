"""Raw text as a stream of documents.

A text file is one document (one longer than MAX_DOCUMENT_BYTES is several, cut at line ends), a
line of a .jsonl file is one document. Files are read in sorted order, one at a time, so memory is
bounded by MAX_DOCUMENT_BYTES and the same input gives the same stream.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp"})
UNREADABLE_SUFFIXES = frozenset({".gz", ".zst", ".xz", ".bz2", ".zip", ".parquet", ".pdf"})
MAX_DOCUMENT_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """A text and a name for it that does not depend on where the corpus lies on disk.

    `num_bytes` is how much of the input it took up.
    """

    id: str
    text: str
    num_bytes: int


def documents(inputs: Sequence[Path | str], text_field: str = "text") -> Iterator[Document]:
    """Every non-empty document of `inputs`: files, folders (recursively), globs.

    Folders give their files with a text suffix or .jsonl and skip hidden names; a file that is
    named itself is read whatever its suffix. `text_field` is the field of a .jsonl line.
    Raises DataError for missing inputs, files that are not UTF-8, malformed lines, and when there
    is no document at all.
    """
    found = False
    for name, path in input_files(inputs):
        parse = _jsonl_documents if path.suffix == ".jsonl" else _text_documents
        try:
            for document in parse(name, path, text_field):
                found = True
                yield document
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if not found:
        given = ", ".join(str(i) for i in inputs) or "nothing"
        raise DataError(
            f"The corpus is empty: no text in {given}. Folders are searched for "
            f"{', '.join(sorted(TEXT_SUFFIXES))} and .jsonl files; name a file of another suffix "
            "itself."
        )


def input_files(inputs: Sequence[Path | str]) -> Iterator[tuple[str, Path]]:
    """(stable name, path) of every file in `inputs`, in order. Raises DataError if one is missing.

    The name starts with the input's number, so that two folders may hold files of one name.
    """
    for number, given in enumerate(inputs):
        root = Path(given)
        if root.is_dir():
            for path in _walk(root):
                yield f"{number}/{path.relative_to(root).as_posix()}", path
        elif root.exists():
            if root.suffix in UNREADABLE_SUFFIXES:
                raise DataError(
                    f"{root}: {root.suffix} files cannot be read; unpack or convert it to UTF-8 "
                    "text or .jsonl first."
                )
            yield f"{number}/{root.name}", root
        elif matches := sorted(glob.glob(str(given), recursive=True)):
            base = os.path.commonpath(matches) if len(matches) > 1 else os.path.dirname(matches[0])
            for match in filter(os.path.isfile, matches):
                yield f"{number}/{os.path.relpath(match, base)}", Path(match)
        else:
            raise DataError(
                f"{given}: no such file or folder, and no file matches it as a pattern. Check the "
                f"path (working folder: {Path.cwd()})."
            )


def _walk(folder: Path) -> Iterator[Path]:
    """Text and .jsonl files below `folder`, sorted, one directory listing in memory at a time."""
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}).") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path)
        elif entry.is_file() and (path.suffix in TEXT_SUFFIXES or path.suffix == ".jsonl"):
            yield path


def _text_documents(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """The file as one document, or as several where it is longer than MAX_DOCUMENT_BYTES."""
    offset = part = 0
    rest = b""
    with path.open("rb") as file:
        while True:
            block = rest + file.read(MAX_DOCUMENT_BYTES - len(rest))
            if not block:
                return
            rest = b""
            if len(block) == MAX_DOCUMENT_BYTES:
                # Cut after the last line; in a file without lines, before the last character.
                cut = block.rfind(b"\n") + 1 or _character_start(block)
                block, rest = block[:cut], block[cut:]
            text = _decode(block, path, offset)
            if text.strip():
                yield Document(f"{name}#{part}" if part else name, text, len(block))
            offset += len(block)
            part += 1


def _character_start(block: bytes) -> int:
    """Start of the last UTF-8 character in `block`, which may be incomplete."""
    start = len(block) - 1
    while start > len(block) - 4 and block[start] & 0xC0 == 0x80:
        start -= 1
    return start


def _jsonl_documents(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """One document a line; blank lines are skipped."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_BYTES), b""), 1):
            where = f"{path}:{number}"
            if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                raise DataError(
                    f"{where}: the line is longer than {MAX_DOCUMENT_BYTES} bytes; split the "
                    "document over several lines."
                )
            text = _decode(line, path, offset)
            offset += len(line)
            if text.strip():
                value = _field(text, text_field, where)
                if value.strip():
                    yield Document(f"{name}:{number}", value, len(line))


def _field(line: str, text_field: str, where: str) -> str:
    """The text of one .jsonl line."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON ({error}). Every line must be one JSON object."
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, not an object with fields.")
    if text_field not in row:
        fields = ", ".join(row) or "none"
        raise DataError(
            f"{where}: no field {text_field!r} (fields: {fields}). Name the text's field with "
            "--text-field."
        )
    value = row[text_field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {text_field!r} is {type(value).__name__}, not a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {text_field!r} holds half of a surrogate pair at character "
            f"{error.start}, which is no Unicode text; mend or drop the line."
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
