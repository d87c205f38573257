"""A dataset's files as this node has them: verified, and in a cache where they are not its own.

Files of a local folder are read where they are. What is remote or compressed is brought into the
cache first, once for all ranks of a node, and goes again, least recently used first, when the cache
is fuller than its bound. Every file is checked against its size and xxh64 once per node: a marker
beside the cache says which file, of which size and time of change, has been found sound.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
import zstandard

from data_pipeline.errors import DataError
from data_pipeline.remote import download, is_remote

BLOCK = 1 << 22
LOCK = ".lock"
MANY_RANKS = 16  # that may fill one cache at once


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
        key = hashlib.sha256(self.location.encode()).hexdigest()[:16]
        self._copies = cache.folder / "shards" / key
        self._markers = cache.folder / "sound"
        self._room = 0  # bytes that the cache can take at least, whatever other ranks do

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

    def sound(self, raw: FileInfo, packed: FileInfo | None = None) -> Path:
        """This node's copy of a file, checked; packed: what is stored in its place, compressed.

        Raises DataError naming the file: missing, cut off, damaged or not to be had.
        """
        if not self.remote and packed is None:
            path = Path(self.location) / raw.name
            self._check_once(path, raw, f"{path}")
            return path
        path = self._copies / f"{raw.digest}-{raw.name}"  # other data may come to be there
        with self._cache_errors(), contextlib.suppress(FileNotFoundError):
            os.utime(path)  # it is in use
            return path  # only what is sound is ever given its name
        with self._locked(path):
            if not path.exists():
                self._fetch(path, raw, packed)
        self._evict(path, raw.size)
        return path

    def _check_once(self, path: Path, info: FileInfo, name: str) -> None:
        """Check a file unless it was found sound on this node before, and has not changed since."""
        try:
            stat = path.stat()
        except OSError as error:
            raise _missing(name, error) from error
        parts = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, info)
        marker = self._markers / xxhash.xxh128_hexdigest(repr(parts).encode())
        if marker.exists():
            return
        with self._locked(marker):
            if marker.exists():
                return
            check(path, info, name)
            marker.touch()

    def _fetch(self, path: Path, raw: FileInfo, packed: FileInfo | None) -> None:
        stored = packed or raw
        name = self.name(stored.name)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="part.") as folder:
            source = Path(self.location) / stored.name
            if self.remote:
                source = Path(folder) / stored.name
                self._download(stored.name, source)
            check(source, stored, name)
            if packed is not None:
                unpacked = Path(folder) / raw.name
                _decompress(source, unpacked, name)
                check(unpacked, raw, name)
                source = unpacked
            os.replace(source, path)

    def _download(self, file: str, target: Path) -> None:
        download(self.name(file), target, timeout=self.cache.timeout, attempts=self.cache.attempts)

    def _evict(self, keep: Path, added: int) -> None:
        """Remove what was used longest ago until the cache is within its bound."""
        self._room -= MANY_RANKS * added
        if self._room > 0:  # as much as looking at every file has found, and not taken since
            return
        root = self.cache.folder / "shards"
        with self._locked(root / "evict"):
            files = []
            for path in root.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file() and path.suffix != LOCK:
                        stat = path.stat()
                        files.append((stat.st_mtime_ns, stat.st_size, path))
            excess = sum(size for _, size, _ in files) - self.cache.limit_bytes
            for _, size, path in sorted(files):
                if excess > 0 and path != keep:
                    path.unlink(missing_ok=True)  # a rank that reads it keeps its open file
                    excess -= size
            self._room = -excess

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """One process and thread of this node at a time; ends with the process that holds it."""
        with self._cache_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(f"{path}{LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self._cache_errors():
                yield
        finally:
            os.close(lock)

    @contextmanager
    def _cache_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(
                f"data.cache_dir {self.cache.folder}: {error.strerror} ({error.filename}). Free "
                "space there, lower data.cache_gib, or name another folder of this node."
            ) from error


def check(path: Path, info: FileInfo, name: str) -> None:
    """Compare a file with its size and xxh64. Raises DataError."""
    digest = xxhash.xxh64()
    size = 0
    try:
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise _missing(name, error) from error
    if size != info.size:
        raise DataError(
            f"{name}: {size} bytes, but index.json says {info.size}; the shard is cut off or "
            "overwritten. Copy it again or prepare the data anew."
        )
    if digest.hexdigest() != info.digest:
        raise DataError(
            f"{name}: checksum xxh64 {digest.hexdigest()}, but index.json says {info.digest}; its "
            "content is damaged. Copy it again or prepare the data anew."
        )


def _missing(name: str, error: OSError) -> DataError:
    return DataError(
        f"{name}: cannot be read ({error.strerror}), but index.json lists it; copy the shard again "
        "or prepare the data anew."
    )


def _decompress(source: Path, target: Path, name: str) -> None:
    try:
        with source.open("rb") as packed, target.open("wb") as raw:
            zstandard.ZstdDecompressor().copy_stream(packed, raw)
    except zstandard.ZstdError as error:
        raise DataError(
            f"{name}: cannot be decompressed ({error}), though its checksum is right; prepare the "
            "data anew."
        ) from error
