"""Which text there is: input files in a fixed order, cut into units of work.

A text file is one document, a line of a .jsonl file or a row of a .parquet file is one; each may be
compressed (.gz, .zst). Units hold about as many bytes each and depend on the files' names and sizes
alone, so whoever shares them out, however many there are, reads the same documents in the same
units.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_pipeline.compressed import is_compressed
from data_pipeline.errors import DataError
from untrusted.errors import UntrustedError
from untrusted.files import open_regular

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp"})
ROW_SUFFIXES = frozenset({".jsonl", ".parquet"})
UNREADABLE_SUFFIXES = frozenset(
    {".xz", ".bz2", ".lz4", ".zip", ".7z", ".tar", ".tgz", ".pdf", ".docx"}
)
SAMPLED_BLOCKS, BLOCK_BYTES = 8, 1 << 13


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an input file: of .jsonl the lines that begin in bytes [start, end), of .parquet the
    row groups [start, end), of all else, and of what is compressed, the whole file.

    `name` does not depend on where the corpus lies on disk; `num_bytes` is how much of the input
    the piece is; `content` tells other text from this [see _fingerprint].
    """

    name: str
    path: Path
    start: int
    end: int
    num_bytes: int
    content: str


def kind(path: Path) -> str:
    """The suffix that says how a file is read, in lower case, that of compression left out."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


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
            raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
        except UntrustedError as error:
            raise DataError(str(error)) from error
        for piece in pieces:
            unit.append(piece)
            size += piece.num_bytes
            if size >= unit_bytes:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def _pieces(name: str, path: Path, unit_bytes: int) -> list[Piece]:
    with open_regular(path, follow_link=True) as raw:
        file = raw.fileno()
        size = os.fstat(file).st_size
        if kind(path) == ".jsonl" and not is_compressed(path):
            starts = range(0, max(size, 1), unit_bytes)
            ends = [min(start + unit_bytes, size) for start in starts]
            return [
                Piece(name, path, start, end, end - start, _fingerprint(file, start, end))
                for start, end in zip(starts, ends, strict=True)
            ]
        content = _fingerprint(file, 0, size)
    if kind(path) == ".parquet" and not is_compressed(path):
        return _row_groups(name, path, size, unit_bytes, content)
    return [Piece(name, path, 0, size, size, content)]


def _fingerprint(file: int, start: int, end: int) -> str:
    """Of bytes [start, end): all of them if they are few, else blocks from head to tail.

    Not the time of the last change: nodes that work on one output may have copies of their own.
    Not every byte: each job of an array does this for the whole corpus before it begins.
    """
    size = end - start
    digest = xxhash.xxh3_128(str(size).encode())
    if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
        digest.update(os.pread(file, size, start))
        return digest.hexdigest()
    for block in range(SAMPLED_BLOCKS):
        at = start + (size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1)
        digest.update(os.pread(file, BLOCK_BYTES, at))
    return digest.hexdigest()


def _row_groups(name: str, path: Path, size: int, unit_bytes: int, content: str) -> list[Piece]:
    """Runs of row groups, each of about unit_bytes of the file."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        groups = pyarrow.parquet.read_metadata(path).num_row_groups
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a Parquet file ({error}).") from error
    together = max(1, unit_bytes * groups // max(size, 1))
    pieces = []
    for start in range(0, groups, together):
        end = min(start + together, groups)
        pieces.append(Piece(name, path, start, end, size * (end - start) // groups, content))
    return pieces


def input_files(inputs: Sequence[Path | str]) -> Iterator[tuple[str, Path]]:
    """(stable name, path) of every file in `inputs`, in order. Raises DataError if one is missing.

    The name starts with the input's number, so that two folders may hold files of one name.
    """
    for number, given in enumerate(inputs):
        named = [str(given)]
        if not os.path.exists(given):
            named = sorted(glob.glob(str(given), recursive=True))
        if not named:
            raise DataError(
                f"{given}: no such file or folder, and no file matches it as a pattern. Check the "
                f"path (working folder: {Path.cwd()})."
            )
        if len(named) > 1:
            base = os.path.commonpath(named)
        else:
            base = named[0] if os.path.isdir(given) else os.path.dirname(named[0])
        for path in _files(named):
            yield f"{number}/{os.path.relpath(path, base)}", path


def _files(named: Sequence[str]) -> Iterator[Path]:
    """Those named, and those in folders that are, each once."""
    found: set[Path] = set()
    folders: set[tuple[int, int]] = set()
    for path in map(Path, named):
        for file in _walk(path, folders) if path.is_dir() else _readable(path):
            if file not in found:
                found.add(file)
                yield file


def _readable(path: Path) -> Iterator[Path]:
    """A file that is named itself, whatever its suffix, except what is surely no text."""
    if kind(path) in UNREADABLE_SUFFIXES:
        raise DataError(
            f"{path}: {kind(path)} files cannot be read; unpack or convert it to UTF-8 text, "
            ".jsonl or .parquet first."
        )
    yield path


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Readable files below `folder`, sorted, one directory listing in memory at a time.

    Links are followed, but no folder is read twice (`seen`: by device and inode).
    """
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}).") from error
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and path.is_dir()):
            yield from _walk(path, seen)
        elif kind(path) in TEXT_SUFFIXES | ROW_SUFFIXES and path.is_file():
            yield path
