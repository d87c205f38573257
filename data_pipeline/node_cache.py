"""A folder of this node that all ranks, and all runs of a user, share.

    shards/DATA/COPY    copies of remote or compressed files; their atime is their last use
    parts/BYTES.XXXX/   being fetched, and the room it may take; locked while its owner lives
    sound/MARKER        of a file that has been found sound
    locks/NN

Nothing here outlives its use: locks are as many as LOCKS, parts of killed processes go with the
next fetch, markers after MARKER_DAYS, copies when the room is needed.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from data_pipeline.errors import DataError

LOCKS = 256
ROOM = "room"  # the lock of whoever counts and removes
OWNER = "owner"  # in a part: its lock
MARKER_DAYS = 30
WAIT_SECONDS = 0.01


class NodeCache:
    """Room, locks and markers in one folder. Methods raise DataError when it cannot be used."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.shards, self._parts = folder / "shards", folder / "parts"
        self._sound, self._locks = folder / "sound", folder / "locks"
        self._pruned = False

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What the operating system refuses in the body is told as a fault of this node."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"data.cache_dir {self.folder}: {error.strerror or error} ({_place(error)}). Free "
                "space or mend permissions there, lower data.cache_gib, or name another folder of "
                "this node there (or in $TMPDIR)."
            ) from error

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One process and thread of this node at a time; ends with the process that holds it."""
        number = xxhash.xxh64_intdigest(name.encode()) % LOCKS
        with self.errors(), self._held("room" if name == ROOM else f"{number:02x}"):
            yield

    @contextmanager
    def _held(self, file: str) -> Iterator[None]:
        self._locks.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._locks / file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    # -- room ----------------------------------------------------------------------------------

    @contextmanager
    def part(self, size: int) -> Iterator[Path]:
        """An empty folder to fetch into, once there is room for `size` bytes; removed at the end.

        Copies that were used longest ago make room. Waits for other fetches if they take it all.
        """
        while (made := self._make_part(size)) is None:
            time.sleep(WAIT_SECONDS)
        folder, owner = made
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(owner)

    def _make_part(self, size: int) -> tuple[Path, int] | None:
        """The folder and its lock, or None while other fetches take the room."""
        with self.locked(ROOM):
            self._parts.mkdir(parents=True, exist_ok=True)
            promised = [int(part.name.split(".")[0]) for part in self._living_parts()]
            left = self._evict(self.limit_bytes - sum(promised) - size)
            if promised and left < 0:
                return None
            folder = Path(tempfile.mkdtemp(prefix=f"{size}.", dir=self._parts))
            owner = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(owner, fcntl.LOCK_EX)
            return folder, owner

    def _living_parts(self) -> Iterator[Path]:
        """Folders that somebody fetches into; others are removed."""
        for part in self._parts.iterdir():
            if _is_held(part / OWNER):
                yield part
            else:
                shutil.rmtree(part, ignore_errors=True)

    def _evict(self, room: int) -> int:
        """Remove copies until those left fit into `room` bytes; what then is free."""
        copies = []
        for path in self.shards.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                copies.append((stat.st_atime_ns, stat.st_size, path))
        free = room - sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if free >= 0:
                break
            path.unlink(missing_ok=True)  # a rank that reads it keeps its open file
            free += size
        return free

    # -- markers -------------------------------------------------------------------------------

    def is_marked(self, key: str) -> bool:
        """Whether the file that `key` describes has been found sound."""
        return os.path.exists(self._marker(key))

    def mark(self, key: str) -> None:
        """It has."""
        with self.errors():
            self._sound.mkdir(parents=True, exist_ok=True)
            self._prune()
            self._marker(key).touch()

    def unmark(self, key: str) -> None:
        """It is in doubt again."""
        with self.errors():
            self._marker(key).unlink(missing_ok=True)

    def _marker(self, key: str) -> Path:
        return self._sound / xxhash.xxh128_hexdigest(key.encode())

    def _prune(self) -> None:
        """Remove old markers, once."""
        if self._pruned:
            return
        self._pruned = True
        oldest = time.time() - MARKER_DAYS * 24 * 3600
        for entry in os.scandir(self._sound):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_mtime < oldest:
                    os.unlink(entry.path)


def _is_held(lock: Path) -> bool:
    """Whether a living process has locked this file."""
    try:
        file = os.open(lock, os.O_RDWR)
    except FileNotFoundError:  # a part that its owner is removing
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _place(error: OSError) -> str:
    return str(error.filename2 or error.filename or f"errno {error.errno}")
