"""A dataset's files as this node has them: verified, and in a cache where they are not its own.

Files of a local folder are read where they are. What is remote or compressed is brought into the
node's cache first, once for all ranks, and goes again when the cache needs the room (node_cache).
Every file, copies included, is checked against its size and xxh64 once per node: a marker says
which file, of which size, time of change and inode, has been found sound. A copy that no longer is
gets fetched again. What is given out is open, so that nobody can take it away.

Names, sizes and files come from whoever made the dataset: names stay in its folder, links and
devices are refused, no more is read, fetched or decompressed than index.json says, and content is
compared before it is moved to where copies are.
"""

import errno
import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import xxhash
import zstandard

from data_pipeline.errors import BadFileError, DataError
from data_pipeline.node_cache import NodeCache, default_cache_dir
from data_pipeline.remote import download, is_remote
from untrusted.errors import UntrustedError
from untrusted.files import open_regular, read_regular
from untrusted.names import name_in
from untrusted.records import MAX_BYTES

log = logging.getLogger("transxssm")

BLOCK = 1 << 22
FAULTS_OF_A_FILE = frozenset(  # others are of the node
    {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ENAMETOOLONG}
)
NAME_LETTERS = 48  # of a shard's name in that of its copy, after a checksum; 4 bytes each at most


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
        self._data = hashlib.sha256(self.location.encode()).hexdigest()[:16]

    def name(self, file: str) -> str:
        """What to call a file in messages: its path or URL."""
        return f"{self.location}/{file}"

    def read(self, file: str) -> bytes:
        """Return the content of a small file, fetched again. Raises DataError for a remote that
        fails and for what is no file, OSError for a local file that cannot be read."""
        try:
            if not self.remote:
                return read_regular(Path(self.location) / file, MAX_BYTES, follow_link=True)
            with tempfile.TemporaryDirectory() as folder:
                self._download(file, Path(folder) / "content", MAX_BYTES, follow_link=True)
                return read_regular(Path(folder) / "content", MAX_BYTES)
        except UntrustedError as error:
            raise DataError(str(error)) from error

    def open(
        self, raw: FileInfo, packed: FileInfo | None = None, *, recheck: bool = False
    ) -> IO[bytes]:
        """A file that has been checked; packed: what is stored in its place, compressed.

        recheck: check it now, also if it was found sound before.
        Raises BadFileError naming the file (missing, cut off, damaged or not to be had), DataError
        for a fault of this node.
        """
        if not self.remote and packed is None:
            return self._open_in_place(raw, recheck)
        copy = f"{raw.digest}-{Path(raw.name).name[-NAME_LETTERS:]}"  # other data may come here
        if not recheck and (file := self._copy(copy, raw, check_it=False)) is not None:
            return file
        with self._node.locked(f"{self._data}/{copy}"):  # somebody may just have fetched it
            known = None if recheck else self._copy(copy, raw, check_it=False)
            return known or self._copy(copy, raw, check_it=True) or self._fetch(copy, raw, packed)

    def _open_in_place(self, info: FileInfo, recheck: bool) -> IO[bytes]:
        name = self.name(info.name)
        path = self._path(info.name)
        file = _opened(path, name)
        key = _identity(os.path.realpath(path), file, info, in_place=True)
        if recheck:
            self._node.unmark(key)
        if not self._node.is_marked(key):
            with self._node.locked(key):
                if not self._node.is_marked(key):
                    check(file, info, name)
                    self._node.mark(key)
        return file

    def _path(self, file: str) -> Path:
        """Path of a shard's file in a folder of this node. Raises BadFileError."""
        folder = Path(self.location.removeprefix("file://"))
        try:
            return name_in(folder, file, self.name("index.json"))
        except UntrustedError as error:
            raise BadFileError(str(error)) from error

    def _copy(self, copy: str, info: FileInfo, *, check_it: bool) -> IO[bytes] | None:
        """The copy that is there, or None if there is none that was found, or is, sound.

        check_it: whether to compute its checksum, and to remove it if it is another.
        """
        file = self._node.open_copy(self._data, copy)
        if file is None:
            return None
        key = self._copy_identity(copy, file, info)
        if not check_it:
            return file if self._node.is_marked(key) else None
        try:
            check(file, info, f"{self._node.folder}/shards/{self._data}/{copy}")
        except BadFileError as error:
            log.warning("a copy is not sound and will be fetched again: %s", error)
            self._node.unmark(key)
            self._node.remove_copy(self._data, copy)
            return None
        self._node.mark(key)
        return file

    def _copy_identity(self, copy: str, file: IO[bytes], info: FileInfo) -> str:
        return _identity(f"{self._node.folder}/shards/{self._data}/{copy}", file, info)

    def _fetch(self, copy: str, raw: FileInfo, packed: FileInfo | None) -> IO[bytes]:
        """Make a copy. The caller holds its lock."""
        stored = packed or raw
        name = self.name(stored.name)
        size = raw.size + (packed.size if packed else 0)
        with self._node.part(size) as folder, self._node.errors():
            source = folder / "stored"
            if self.remote:
                self._download(stored.name, source, stored.size)
            else:
                source = self._path(stored.name)
            file = _opened(source, name)
            check(file, stored, name)
            if packed is not None:
                source = folder / "raw"
                _decompress(file, source, raw.size, name)
                file = _opened(source, name)
                check(file, raw, name)
            os.fsync(file.fileno())  # lest a node that loses power keeps its name and no content
            self._node.keep_copy(source, self._data, copy)
            self._node.mark(self._copy_identity(copy, file, raw))
            return file

    def _download(
        self, file: str, target: Path, max_bytes: int, *, follow_link: bool = False
    ) -> None:
        if self.location.startswith("file://"):
            self._path(file)  # no link leads to it
        download(
            self.name(file),
            target,
            max_bytes=max_bytes,
            timeout=self.cache.timeout,
            attempts=self.cache.attempts,
            follow_link=follow_link,
        )


def _identity(path: str, file: IO[bytes], info: FileInfo, *, in_place: bool = False) -> str:
    """Which file, in which state, a marker is about.

    The time of its last change of any kind cannot be set back, but copies have theirs changed.
    """
    stat = os.fstat(file.fileno())
    changed = stat.st_ctime_ns if in_place else 0
    parts = (path, stat.st_size, stat.st_mtime_ns, changed, stat.st_ino, info)
    return repr(parts)


def check(file: IO[bytes], info: FileInfo, name: str) -> None:
    """Compare an open file with its size and xxh64. Raises BadFileError; DataError where this node
    cannot read it."""
    digest = xxhash.xxh64()
    size = os.fstat(file.fileno()).st_size
    if size != info.size:
        raise BadFileError(
            f"{name}: {size} bytes, but index.json says {info.size}; the shard is cut off or "
            "overwritten. Copy it again or prepare the data again."
        )
    size = 0
    try:
        while block := os.pread(file.fileno(), min(BLOCK, info.size - size), size):
            digest.update(block)
            size += len(block)
    except OSError as error:
        raise _unreadable(name, error) from error
    if digest.hexdigest() != info.digest:
        raise BadFileError(
            f"{name}: checksum xxh64 {digest.hexdigest()}, but index.json says {info.digest}; its "
            "content is damaged. Copy it again or prepare the data again."
        )


def _opened(path: Path, name: str) -> IO[bytes]:
    try:
        return open_regular(path)
    except OSError as error:
        raise _unreadable(name, error) from error
    except UntrustedError as error:
        raise BadFileError(str(error)) from error


def _unreadable(name: str, error: OSError) -> DataError:
    if error.errno in FAULTS_OF_A_FILE:
        return BadFileError(
            f"{name}: cannot be read ({error.strerror}), but index.json lists it; copy the shard "
            "again or prepare the data again."
        )
    return DataError(
        f"{name}: cannot be read by this process ({error.strerror}), though the shard may be "
        "sound; fix its permissions or this node's limits."
    )


def _decompress(packed: IO[bytes], target: Path, size: int, name: str) -> None:
    """Write `size` bytes at most. Raises BadFileError for more, and for what is damaged."""
    left = size
    try:
        with (
            zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as reader,
            target.open("xb") as raw,
        ):
            while block := reader.read(min(BLOCK, left + 1)):
                left -= len(block)
                if left < 0:
                    raise BadFileError(
                        f"{name}: decompressed, it is larger than the {size} bytes that index.json "
                        "says; prepare the data again."
                    )
                raw.write(block)
    except zstandard.ZstdError as error:
        raise BadFileError(
            f"{name}: cannot be decompressed ({error}), though its checksum is right; prepare the "
            "data again."
        ) from error
