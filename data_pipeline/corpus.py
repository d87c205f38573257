"""Which text there is: input files in a fixed order, cut into units of work.

A text file is one document (one longer than MAX_DOCUMENT_BYTES is several, cut at line ends), a
line of a .jsonl file or a row of a .parquet file is one document; text and .jsonl files may be
compressed (.gz, .zst). Units hold about as many bytes each and depend on the files' names and sizes
alone, so whoever shares them out, however many there are, reads the same documents in the same
units.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp"})
ROW_SUFFIXES = frozenset({".jsonl", ".parquet"})
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})
UNREADABLE_SUFFIXES = frozenset({".xz", ".bz2", ".zip", ".pdf", ".docx"})


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an input file: of .jsonl the lines that begin in bytes [start, end), of .parquet the
    row groups [start, end), of all else the whole file.

    `name` does not depend on where the corpus lies on disk; `num_bytes` is how much of the input
    the piece is.
    """

    name: str
    path: Path
    start: int
    end: int
    num_bytes: int


def kind(path: Path) -> str:
    """The suffix that says how a file is read, that of compression left out."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def units(inputs: Sequence[Path | str], unit_bytes: int) -> Iterator[list[Piece]]:
    """The pieces of every file, in order, in lists of about `unit_bytes`.

    Raises DataError for inputs that are missing or cannot be read.
    """
    unit: list[Piece] = []
    size = 0
    for name, path in input_files(inputs):
        try:
            pieces = _pieces(name, path, unit_bytes)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        for piece in pieces:
            unit.append(piece)
            size += piece.num_bytes
            if size >= unit_bytes:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def _pieces(name: str, path: Path, unit_bytes: int) -> list[Piece]:
    size = path.stat().st_size
    if path.suffix == ".parquet":
        return _row_groups(name, path, size, unit_bytes)
    if path.suffix != ".jsonl":
        return [Piece(name, path, 0, size, size)]
    starts = range(0, max(size, 1), unit_bytes)
    return [
        Piece(name, path, s, min(s + unit_bytes, size), min(unit_bytes, size - s)) for s in starts
    ]


def _row_groups(name: str, path: Path, size: int, unit_bytes: int) -> list[Piece]:
    """Runs of row groups, each of about unit_bytes of the file."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        groups = pyarrow.parquet.read_metadata(path).num_row_groups
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}).") from error
    together = max(1, unit_bytes * groups // max(size, 1))
    return [
        Piece(name, path, s, min(s + together, groups), size * min(together, groups - s) // groups)
        for s in range(0, groups, together)
    ]


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
                    "text, .jsonl or .parquet first."
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
    """Readable files below `folder`, sorted, one directory listing in memory at a time."""
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
        elif entry.is_file() and kind(path) in TEXT_SUFFIXES | ROW_SUFFIXES:
            yield path
