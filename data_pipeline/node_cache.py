"""A folder of this node that all ranks, and all runs of a user, share.

    shards/DATA/COPY    copies of remote or compressed files; their atime is their last use
    parts/BYTES.XXXX/   being fetched, and the room it may take; locked while its owner lives
    sound/MARKER        of a file that has been found sound
    locks/NN

Nothing here outlives its use: locks are as many as LOCKS, parts of killed processes go with the
next fetch, markers after MARKER_DAYS, copies when the room is needed.

Copies and markers are believed, so the folder and those in it have to be this user's alone, and
its name can be known to others before it is made. Another is used where they are not. What lies in
it is reached from its descriptor, and no link is followed.
"""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO

import xxhash

from data_pipeline.errors import DataError
from untrusted.errors import UnsafeFileError
from untrusted.private import FOLDER, make_private, open_private, private_folder

log = logging.getLogger("transxssm")

SHARDS, PARTS, SOUND, LOCKED = SUBFOLDERS = ("shards", "parts", "sound", "locks")
LOCKS = 256
ROOM = "room"  # the lock of whoever counts and removes
OWNER = "owner"  # in a part: its lock
MARKER_DAYS = 30
WAIT_SECONDS = 0.01
WARN_SECONDS, GIVE_UP_SECONDS = 30.0, 600.0  # of waiting for others, who may fetch a large shard
SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def default_cache_dir() -> Path:
    """Return the node's folder for this user; others may have made it [see NodeCache.folder]."""
    return Path(tempfile.gettempdir()) / f"transxssm-{os.getuid()}"


class NodeCache:
    """Room, locks and markers in one folder. Methods raise DataError when it cannot be used."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._named, self.limit_bytes = folder, limit_bytes
        self._pruned = False

    @cached_property
    def folder(self) -> Path:
        """The folder in use, verified: the one named, or another that is this user's alone."""
        if self._named == default_cache_dir():
            return _private_folder(self._named)
        self._named.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self._named.mkdir(mode=0o700)
        os.close(os.open(f"{self._named}/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        folder = self._named.resolve()  # who names a folder may name a link to it
        fault = make_private(folder, SUBFOLDERS, close=False)
        if fault is None:
            return folder
        own = _private_folder(folder / f"transxssm-{os.getuid()}")
        log.warning(
            "data.cache_dir %s cannot be used: %s, so others could have put data there. %s is used "
            "instead, which is this user's alone; name a folder of your own in data.cache_dir.",
            *(self._named, fault, own),
        )
        return own

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Report what the operating system refuses in the body as a fault of this node."""
        try:
            yield
        except OSError as error:
            raise self._error(f"{error.strerror or error} ({_place(error)})") from error
        except UnsafeFileError as error:
            raise self._error(str(error)) from error

    def _error(self, reason: str) -> DataError:
        return DataError(
            f"data.cache_dir {self._named}: {reason}. Free space, fix permissions or remove what "
            "is in the way there, lower data.cache_gib, or name another folder of this node there "
            "(or in $TMPDIR)."
        )

    @contextmanager
    def _entered(self, subfolder: str, inside: str | None = None) -> Iterator[int]:
        """Descriptor of a subfolder, or of a folder inside it."""
        with contextlib.ExitStack() as opened:
            try:
                folder = self._open(subfolder)
            except FileNotFoundError:  # who cleans TMPDIR removes old folders, empty ones too
                fault = make_private(self.folder, SUBFOLDERS, close=False)
                if fault is not None:
                    raise UnsafeFileError(fault) from None
                folder = self._open(subfolder)
            opened.callback(os.close, folder)
            if inside is not None:
                folder = open_private(inside, folder)
                opened.callback(os.close, folder)
            yield folder

    def _open(self, subfolder: str) -> int:
        folder = open_private(self.folder)
        try:
            return open_private(subfolder, folder)
        finally:
            os.close(folder)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One process and thread of this node at a time; ends with the process that holds it."""
        number = xxhash.xxh64_intdigest(name.encode()) % LOCKS
        with self.errors(), self._held(ROOM if name == ROOM else f"{number:02x}"):
            yield

    @contextmanager
    def _held(self, file: str) -> Iterator[None]:
        with self._entered(LOCKED) as folder:
            lock = _open(file, os.O_RDWR | os.O_CREAT, folder, self.folder / LOCKED)
        try:
            waiting = Waiting(f"the lock {self.folder / LOCKED / file}")
            while not _lock(lock):
                waiting.wait()
            yield
        finally:
            os.close(lock)

    # -- room ----------------------------------------------------------------------------------

    @contextmanager
    def part(self, size: int) -> Iterator[Path]:
        """An empty folder to fetch into, once there is room for `size` bytes; removed at the end.

        Copies that were used longest ago make room. Waits for other fetches if they take it all.
        """
        with self.errors():
            waiting = Waiting(f"room in {self.folder / PARTS}")
        while isinstance(made := self._make_part(size), list):
            waiting.wait(made)
        name, owner = made
        try:
            yield self.folder / PARTS / name
        finally:
            with contextlib.suppress(OSError, UnsafeFileError), self._entered(PARTS) as parts:
                _remove(name, parts)
            os.close(owner)

    def _make_part(self, size: int) -> tuple[str, int] | list[str]:
        """Its name and lock, or the other fetches while they take the room."""
        with self.locked(ROOM), self._entered(PARTS) as parts:
            others = list(_living_parts(parts))
            promised = sum(int(name.split(".")[0]) for name in others)
            self._check_disk(size, "total")  # lest copies be removed in vain
            left = self._evict(self.limit_bytes - promised - size)
            if others and left < 0:
                return others
            self._check_disk(size, "free")
            name = f"{size}.{secrets.token_hex(8)}"
            os.mkdir(name, 0o700, dir_fd=parts)
            with self._entered(PARTS, name) as part:
                owner = _open(OWNER, os.O_RDWR | os.O_CREAT, part, self.folder / PARTS / name)
            _lock(owner)
            return name, owner

    def _check_disk(self, size: int, kind: str) -> None:
        """Raises OSError for more bytes than the disk has, in total or free."""
        room = getattr(shutil.disk_usage(self.folder), kind)
        if size > room:
            reason = f"{size:,} bytes to fetch, and the disk has {room:,} {kind}"
            raise OSError(errno.ENOSPC, reason, str(self.folder))

    def _evict(self, room: int) -> int:
        """Remove copies until those left fit into `room` bytes; return what then is free."""
        copies = []
        with self._entered(SHARDS) as shards:
            for data in os.listdir(shards):
                with contextlib.suppress(OSError, UnsafeFileError):
                    copies += [(*found, data) for found in self._sizes(data)]
        free = room - sum(size for _, size, *_ in copies)
        for _, size, name, data in sorted(copies):
            if free >= 0:
                break
            self.remove_copy(data, name)  # a rank that reads it keeps its open file
            free += size
        return free

    # -- copies --------------------------------------------------------------------------------

    def _sizes(self, data: str) -> Iterator[tuple[int, int, str]]:
        """Last use, bytes and name of each copy of some data."""
        with self._entered(SHARDS, data) as folder:
            for name in os.listdir(folder):
                with contextlib.suppress(FileNotFoundError):
                    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    yield found.st_atime_ns, found.st_size, name

    def open_copy(self, data: str, name: str) -> IO[bytes] | None:
        """The copy, which now is in use, or None; what is no file of this user is removed."""
        with self.errors():
            try:
                with self._entered(SHARDS, data) as folder:
                    file = _open(name, os.O_RDONLY, folder, self.folder / SHARDS / data)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENXIO):
                    raise
                self.remove_copy(data, name)
                return None
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                os.close(file)
                self.remove_copy(data, name)
                return None
            os.utime(file, ns=(time.time_ns(), found.st_mtime_ns))
            return os.fdopen(file, "rb")

    def keep_copy(self, source: Path, data: str, name: str) -> None:
        """Move a file from a part to where copies are."""
        with self.errors(), self._entered(SHARDS) as shards:
            with contextlib.suppress(FileExistsError):
                os.mkdir(data, 0o700, dir_fd=shards)
            with self._entered(SHARDS, data) as folder:
                os.replace(source, name, dst_dir_fd=folder)

    def remove_copy(self, data: str, name: str) -> None:
        """Remove a copy, or what is in its place."""
        with self.errors(), self._entered(SHARDS, data) as folder:
            _remove(name, folder)

    # -- markers -------------------------------------------------------------------------------

    def is_marked(self, key: str) -> bool:
        """Return whether the file that `key` describes has been found sound."""
        with self.errors(), self._entered(SOUND) as sound:
            try:
                found = os.stat(_marker(key), dir_fd=sound, follow_symlinks=False)
            except FileNotFoundError:
                return False
        return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()

    def mark(self, key: str) -> None:
        """Record that the file has been found sound."""
        with self.errors(), self._entered(SOUND) as sound:
            self._prune(sound)
            _remove(_marker(key), sound)
            os.close(_open(_marker(key), os.O_WRONLY | os.O_CREAT, sound, self.folder / SOUND))

    def unmark(self, key: str) -> None:
        """Put the file in doubt again."""
        with self.errors(), self._entered(SOUND) as sound:
            _remove(_marker(key), sound)

    def _prune(self, sound: int) -> None:
        """Remove old markers, once."""
        if self._pruned:
            return
        self._pruned = True
        oldest = time.time() - MARKER_DAYS * 24 * 3600
        for name in os.listdir(sound):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(name, dir_fd=sound, follow_symlinks=False).st_mtime < oldest:
                    _remove(name, sound)


class Waiting:
    """Wait for other processes of this node, but not for ever."""

    def __init__(self, what: str) -> None:
        self.what, self._begin, self._warned = what, time.monotonic(), False
        self._state: object = None

    def wait(self, state: object = None) -> None:
        """Sleep for a moment. Raises DataError once `state` has not changed for too long."""
        if state != self._state:
            self._state, self._begin = state, time.monotonic()
        waited = time.monotonic() - self._begin
        if waited > GIVE_UP_SECONDS:
            raise DataError(
                f"{self.what} has been held by another process for {waited:.0f} s. End that "
                "process (`fuser -v` and `lslocks` name it), or name another folder in "
                "data.cache_dir."
            )
        if waited > WARN_SECONDS and not self._warned:
            self._warned = True
            log.warning(
                "waiting for %s, which another process has held for %.0f s; giving up after %.0f s",
                *(self.what, waited, GIVE_UP_SECONDS),
            )
        time.sleep(WAIT_SECONDS)


@lru_cache
def _private_folder(path: Path) -> Path:
    """One answer, and warning, a process: it may be a new folder."""
    return private_folder(path, SUBFOLDERS)


def _marker(key: str) -> str:
    return xxhash.xxh128_hexdigest(key.encode())


def _open(name: str, flags: int, folder: int, path: Path) -> int:
    """Open a file in a folder, never a link. Raises OSError with its whole path, which is `path`
    and its name."""
    try:
        return os.open(name, flags | SAFE, 0o600, dir_fd=folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path / name)) from error


def _lock(file: int) -> bool:
    """Lock an open file; return whether no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(name: str, folder: int) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        shutil.rmtree(name, ignore_errors=True, dir_fd=folder)


def _living_parts(parts: int) -> Iterator[str]:
    """Names of folders that somebody fetches into; others are removed."""
    for name in os.listdir(parts):
        if name.split(".")[0].isdecimal() and _is_held(name, parts):
            yield name
        else:
            _remove(name, parts)


def _is_held(part: str, parts: int) -> bool:
    """Return whether a living process has locked a part."""
    try:
        folder = os.open(part, FOLDER, dir_fd=parts)
    except OSError:  # no folder, or its owner is removing it
        return False
    try:
        owner = os.open(OWNER, os.O_RDWR | SAFE, dir_fd=folder)
    except OSError:
        return False
    finally:
        os.close(folder)
    try:
        return not _lock(owner)
    finally:
        os.close(owner)


def _place(error: OSError) -> str:
    return str(error.filename2 or error.filename or f"errno {error.errno}")
