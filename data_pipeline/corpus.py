"""Which text there is: input files in a fixed order, cut into units of work.

A text file is one document, or one for each section between separators; a line of a file of JSON
lines (.jsonl, .ndjson, .jsonlines, .json) or a row of a .parquet file is one. Each file may be
compressed (.gz, .zst). Units hold about as many bytes each and depend on the files' names and sizes
alone, so whoever shares them out, however many there are, reads the same documents in the same
units.
"""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from data_pipeline.compressed import is_compressed
from data_pipeline.errors import DataError
from untrusted.errors import UntrustedError
from untrusted.files import open_regular

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp"})
LINE_SUFFIXES = frozenset({".jsonl", ".ndjson", ".jsonlines", ".json"})  # a JSON object a line
ROW_SUFFIXES = LINE_SUFFIXES | {".parquet"}
UNREADABLE_SUFFIXES = frozenset(
    {".xz", ".bz2", ".lz4", ".zip", ".7z", ".tar", ".tgz", ".pdf", ".docx"}
    | {".csv", ".tsv", ".arrow", ".feather", ".avro", ".orc", ".xlsx", ".npy", ".npz", ".pkl"}
)
# What Hugging Face datasets and models keep beside their files, which is no row of theirs.
ABOUT = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"})
SAMPLED_BLOCKS, BLOCK_BYTES = 8, 1 << 13
SHOWN_NAMES, SHOWN_KINDS = 3, 8  # of files that a folder's walk skips

log = logging.getLogger("transxssm")


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an input file: of JSON lines those that begin in bytes [start, end), of .parquet the
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

    @property
    def input_number(self) -> int:
        """Position among the inputs, from 0, of the one that the file belongs to."""
        return int(self.name.partition("/")[0])


def kind(path: Path) -> str:
    """The suffix that says how a file is read, in lower case, that of compression left out."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def units(inputs: Sequence[Path | str], unit_bytes: int) -> Iterator[list[Piece]]:
    """The pieces of every file, in order, in lists of about `unit_bytes`.

    Warns of files that the walk through a folder skips. Raises DataError for inputs that are
    missing or cannot be read.
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
        if kind(path) in LINE_SUFFIXES and not is_compressed(path):
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

    The name starts with the input's number, so that two folders may hold files of one name. Warns
    of files that the walk through a folder skips.
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
        skipped = Skipped()
        for path in _files(named, skipped):
            yield f"{number}/{os.path.relpath(path, base)}", path
        if skipped.total:
            log.warning("%s: %s", given, skipped)


@dataclass
class Skipped:
    """Files that the walk through a folder skips: how many, and the first names, by suffix."""

    total: int = 0
    names: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path, reason: str = "") -> None:
        """Count a file. reason: why it is skipped [its suffix]."""
        self.total += 1
        reason = reason or ("".join(path.suffixes[-2:]) if is_compressed(path) else path.suffix)
        reason = reason or "without a suffix"
        if len(self.counts) >= SHOWN_KINDS and reason not in self.counts:
            reason = "of other kinds"
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < SHOWN_NAMES:
            names.append(path.name)

    def __str__(self) -> str:
        kinds = []
        for reason, count in self.counts.most_common():
            more = ", ..." if count > len(self.names[reason]) else ""
            kinds.append(f"{count:,} {reason} ({', '.join(self.names[reason])}{more})")
        files = "1 file is" if self.total == 1 else f"{self.total:,} files are"
        return (
            f"{files} skipped, as neither text nor rows: {'; '.join(kinds)}. Name a file itself "
            "to have it read as text."
        )


def _files(named: Sequence[str], skipped: Skipped) -> Iterator[Path]:
    """Those named, and those in folders that are, each once."""
    found: set[Path] = set()
    folders: set[tuple[int, int]] = set()
    for path in map(Path, named):
        for file in _walk(path, folders, skipped) if path.is_dir() else _readable(path):
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


def _walk(folder: Path, seen: set[tuple[int, int]], skipped: Skipped) -> Iterator[Path]:
    """Readable files below `folder`, sorted, one directory listing in memory at a time.

    Links are followed, but no folder is read twice (`seen`: by device and inode). What is neither
    read nor hidden goes to `skipped`.
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
            yield from _walk(path, seen, skipped)
        elif kind(path) not in TEXT_SUFFIXES | ROW_SUFFIXES:
            skipped.add(path)
        elif path.name.lower() in ABOUT:
            skipped.add(path, "about a data set or model")
        elif path.is_file():
            yield path
        else:
            skipped.add(path, "no file, or a link to none")
