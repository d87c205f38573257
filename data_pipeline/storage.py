"""A dataset's files as this node has them: verified, and in a cache where they are not its own.

Files of a local folder are read where they are. What is remote or compressed is brought into the
node's cache first, once for all ranks, and goes again when the cache needs the room (node_cache).
Every file, copies included, is checked against its size and xxh64 once per node: a marker says
which file, of which size, time of change and inode, has been found sound. A copy that no longer is
gets fetched again. What is given out is open, so that nobody can take it away.
"""

import errno
import hashlib
import logging
import os
import tempfile
import time
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import xxhash
import zstandard

from data_pipeline.errors import BadFileError, DataError
from data_pipeline.node_cache import NodeCache
from data_pipeline.remote import download, is_remote

log = logging.getLogger("transxssm")

BLOCK = 1 << 22
FAULTS_OF_A_FILE = frozenset({errno.ENOENT, errno.EISDIR, errno.EIO})  # others are of the node


def default_cache_dir() -> Path:
    """Node-local, and the user's own."""
    return Path(tempfile.gettempdir()) / f"transxssm-{os.getuid()}"


@dataclass(frozen=True)
class Cache:
    """Where copies go, how much room they may take, and how they are fetched."""

    folder: Path = field(default_factory=default_cache_dir)
    limit_bytes: int = 256 << 30
    attempts: int = 4
    timeout: float = 60.0  # seconds that a remote may be silent


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file that index.json lists; `digest`: xxh64, hexadecimal."""

    name: str
    size: int
    digest: str


class Storage:
    """The files of one folder of shards, wherever it is."""

    def __init__(self, location: str, cache: Cache) -> None:
        self.location, self.cache = location.rstrip("/"), cache
        self.remote = is_remote(location)
        self._node = NodeCache(cache.folder, cache.limit_bytes)
        key = hashlib.sha256(self.location.encode()).hexdigest()[:16]
        self._copies = self._node.shards / key

    def name(self, file: str) -> str:
        """What to call a file in messages: its path or URL."""
        return f"{self.location}/{file}"

    def read(self, file: str) -> bytes:
        """Content of a small file, fetched anew. Raises DataError for a remote that fails, OSError
        for a local file that cannot be read."""
        if not self.remote:
            return (Path(self.location) / file).read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            self._download(file, Path(folder) / file)
            return (Path(folder) / file).read_bytes()

    def open(
        self, raw: FileInfo, packed: FileInfo | None = None, *, recheck: bool = False
    ) -> FileIO:
        """A file that has been checked; packed: what is stored in its place, compressed.

        recheck: check it now, also if it was found sound before.
        Raises BadFileError naming the file (missing, cut off, damaged or not to be had), DataError
        for a fault of this node.
        """
        if not self.remote and packed is None:
            return self._open_in_place(raw, recheck)
        path = self._copies / f"{raw.digest}-{raw.name}"  # other data may come to be there
        if not recheck and (file := self._copy(path, raw, check_it=False)) is not None:
            return file
        with self._node.locked(str(path)):  # somebody may just have fetched it
            known = None if recheck else self._copy(path, raw, check_it=False)
            return known or self._copy(path, raw, check_it=True) or self._fetch(path, raw, packed)

    def _open_in_place(self, info: FileInfo, recheck: bool) -> FileIO:
        path, name = Path(self.location) / info.name, self.name(info.name)
        file = _opened(path, name)
        key = _identity(path, file, info, in_place=True)
        if recheck:
            self._node.unmark(key)
        if not self._node.is_marked(key):
            with self._node.locked(key):
                if not self._node.is_marked(key):
                    check(file, info, name)
                    self._node.mark(key)
        return file

    def _copy(self, path: Path, info: FileInfo, *, check_it: bool) -> FileIO | None:
        """The copy that is there, or None if there is none that was found, or is, sound.

        check_it: whether to compute its checksum, and to remove it if it is another.
        """
        with self._node.errors():
            try:
                file = FileIO(path)
            except FileNotFoundError:
                return None
            modified = os.fstat(file.fileno()).st_mtime_ns
            os.utime(file.fileno(), ns=(time.time_ns(), modified))  # it is in use
        key = _identity(path, file, info)
        if not check_it:
            return file if self._node.is_marked(key) else None
        try:
            check(file, info, str(path))
        except BadFileError as error:
            log.warning("a copy is not sound and will be fetched again: %s", error)
            self._node.unmark(key)
            path.unlink(missing_ok=True)
            return None
        self._node.mark(key)
        return file

    def _fetch(self, path: Path, raw: FileInfo, packed: FileInfo | None) -> FileIO:
        """Make the copy `path`. The caller holds its lock."""
        stored = packed or raw
        name = self.name(stored.name)
        size = raw.size + (packed.size if packed else 0)
        with self._node.part(size) as folder, self._node.errors():
            source = Path(self.location) / stored.name
            if self.remote:
                source = folder / stored.name
                self._download(stored.name, source)
            file = _opened(source, name)
            check(file, stored, name)
            if packed is not None:
                source = folder / raw.name
                _decompress(file, source, name)
                file = _opened(source, name)
                check(file, raw, name)
            os.fsync(file.fileno())  # lest a node that loses power keeps its name and no content
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, path)
            self._node.mark(_identity(path, file, raw))
            return file

    def _download(self, file: str, target: Path) -> None:
        download(self.name(file), target, timeout=self.cache.timeout, attempts=self.cache.attempts)


def _identity(path: Path, file: FileIO, info: FileInfo, *, in_place: bool = False) -> str:
    """Which file, in which state, a marker is about.

    The time of its last change of any kind cannot be set back, but copies have theirs changed.
    """
    stat = os.fstat(file.fileno())
    changed = stat.st_ctime_ns if in_place else 0
    parts = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, changed, stat.st_ino, info)
    return repr(parts)


def check(file: FileIO, info: FileInfo, name: str) -> None:
    """Compare an open file with its size and xxh64. Raises BadFileError; DataError where this node
    cannot read it."""
    digest = xxhash.xxh64()
    size = 0
    try:
        while block := os.pread(file.fileno(), BLOCK, size):
            digest.update(block)
            size += len(block)
    except OSError as error:
        raise _unreadable(name, error) from error
    if size != info.size:
        raise BadFileError(
            f"{name}: {size} bytes, but index.json says {info.size}; the shard is cut off or "
            "overwritten. Copy it again or prepare the data anew."
        )
    if digest.hexdigest() != info.digest:
        raise BadFileError(
            f"{name}: checksum xxh64 {digest.hexdigest()}, but index.json says {info.digest}; its "
            "content is damaged. Copy it again or prepare the data anew."
        )


def _opened(path: Path, name: str) -> FileIO:
    try:
        return FileIO(path)
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> DataError:
    if error.errno in FAULTS_OF_A_FILE:
        return BadFileError(
            f"{name}: cannot be read ({error.strerror}), but index.json lists it; copy the shard "
            "again or prepare the data anew."
        )
    return DataError(
        f"{name}: cannot be read by this process ({error.strerror}), though the shard may be "
        "sound; mend its permissions or this node's limits."
    )


def _decompress(packed: FileIO, target: Path, name: str) -> None:
    try:
        with target.open("wb") as raw:
            zstandard.ZstdDecompressor().copy_stream(packed, raw)
    except zstandard.ZstdError as error:
        raise BadFileError(
            f"{name}: cannot be decompressed ({error}), though its checksum is right; prepare the "
            "data anew."
        ) from error
