"""OUT.tmp, where `prepare` works until OUT is whole.

    units/KEY                 a unit that is done; it appears whole, by a rename
    train, validation         only once units are being put together, which empties them
    .transxssm-prepare        which work the folder is of, and whether it is merged
    .transxssm-prepare.lock   flock: shared by jobs that do units, exclusive to one that merges them
                              or takes the folder over from other work

So whoever has the lock may go on with what is there: the ones before are done, or dead. Others may
have put something in the place of these folders, where they can write: so each has to be a folder
of this user before what is in it is removed or trusted.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from untrusted.files import NO_LOCKS, open_lock, read_regular
from untrusted.private import check_ours

STATE = ".transxssm-prepare"
LOCK = f"{STATE}.lock"
UNITS = "units"
WAIT_SECONDS, WAIT_SECONDS_ALONE = 10.0, 1.0  # for a job that sets the folder up
MAX_STATE_BYTES = 4096
FOLDER_MODE = 0o775  # less the umask's bits: not for everybody to write, whatever that is

log = logging.getLogger("transxssm")


@dataclass(frozen=True)
class Workplace:
    """OUT.tmp, claimed for some `work`. locked: nobody else is at work there for certain."""

    folder: Path
    work: str
    locked: bool

    @property
    def units(self) -> Path:
        """Where units are, once they are done."""
        return self.folder / UNITS

    def done(self, keys: Collection[str]) -> set[str]:
        """Return those of the units that are done. Raises UnsafeFileError for what is no unit of
        this user."""
        return {key for key in keys if _is_there(self.units / key)}

    @property
    def merged(self) -> bool:
        """Whether only the last rename is left."""
        return _state(self.folder) == f"{self.work} merged"

    def set_merged(self) -> None:
        _set_state(self.folder, f"{self.work} merged")

    def finish(self, out: Path) -> None:
        """Become OUT. May be cut off at any point and repeated."""
        for path in self.folder.iterdir():
            if path.name.startswith(UNITS):
                check_ours(path)
                shutil.rmtree(path)
            elif path.name.startswith(f"{STATE}.") and path.name != LOCK:
                path.unlink()  # of a process killed while it wrote its state
        os.rename(self.folder, out)  # replaces an empty folder
        tidy(out)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def is_finished(out: Path, work: str) -> bool:
    """Whether OUT is that work's, whose process was killed at its very end [see tidy]."""
    return _state(out) == f"{work} merged" and _is_there(out)


def tidy(out: Path) -> None:
    """Remove what says that OUT has been OUT.tmp."""
    for name in (LOCK, STATE):
        (out / name).unlink(missing_ok=True)


def refuse_existing(out: Path) -> None:
    """Raises DataError if OUT is anything but an empty folder."""
    try:
        is_empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise DataError(f"{out}: cannot be looked into ({error.strerror}).") from error
    if not is_empty:
        raise DataError(f"{out} exists and is not an empty folder; remove it or name another.")


@contextmanager
def claim(out: Path, work: str, keys: Collection[str], *, alone: bool) -> Iterator[Workplace]:
    """OUT.tmp for `work`, whose units are `keys`; what others left there is removed, except units
    that are among `keys`.

    alone: with nobody else, else together with others that do the same work.
    Raises DataError if OUT exists, OUT.tmp is not from `prepare`, or others are at work there;
    UnsafeFileError for links and what is of other users.
    """
    refuse_existing(out)  # a root, beside which there is nothing, is one
    folder = out.with_name(out.name + ".tmp")
    try:
        lock, locked = _enter(out, folder, work, keys, alone)
    except OSError as error:
        raise DataError(f"{folder}: cannot be created ({error.strerror}).") from error
    try:
        yield Workplace(folder, work, alone and locked)
    finally:
        os.close(lock)


def _enter(
    out: Path, folder: Path, work: str, keys: Collection[str], alone: bool
) -> tuple[int, bool]:
    """[see claim] The open lock file, and whether it does lock."""
    give_up = time.monotonic() + (WAIT_SECONDS_ALONE if alone else WAIT_SECONDS)
    while True:
        refuse_existing(out)
        entered = _lock(folder, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if entered is not None:
            with ExitStack() as stack:
                stack.callback(os.close, entered[0])
                if alone and not _is_of(folder, work):
                    _take_over(folder, work, keys)
                if _is_of(folder, work):
                    _make(folder / UNITS)
                    stack.pop_all()
                    return entered
            for_a_moment = _lock(folder, fcntl.LOCK_EX)
            if for_a_moment is not None:
                with ExitStack() as stack:
                    stack.callback(os.close, for_a_moment[0])
                    if not _is_of(folder, work):
                        _take_over(folder, work, keys)
                continue
        if time.monotonic() > give_up:
            raise DataError(
                f"{folder}: another `prepare` is at work there. Wait until it has ended, or end "
                "it, and run again; jobs that are to share the work need the same options and "
                "--shard i/n each, without --merge until all are done."
            )
        time.sleep(0.1)


def _lock(folder: Path, mode: int) -> tuple[int, bool] | None:
    """[see _enter] None if others have it, or have removed the folder just now."""
    try:
        _make(folder)
        if _state(folder) is None and any(map(_is_strange, folder.iterdir())):
            raise DataError(f"{folder} is in the way and not from `prepare`; move it elsewhere.")
        file = open_lock(folder / LOCK)
    except FileNotFoundError:
        return None
    locks = True
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(file)
            raise
        locks = False
        log.warning(
            "%s: this file system has no locks (%s); see to it that only jobs with the same "
            "options are at work there, and --merge alone",
            folder,
            error.strerror,
        )
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file), os.lstat(folder / LOCK)):
            return file, locks
    os.close(file)
    return None


def _make(folder: Path) -> None:
    """Make a folder unless it is there. Raises UnsafeFileError for what is not of this user."""
    try:
        folder.mkdir(FOLDER_MODE, parents=True)
    except FileExistsError:
        check_ours(folder)


def _take_over(folder: Path, work: str, keys: Collection[str]) -> None:
    """Remove what is of other work. What vanishes from its place is no more in part than before.

    Raises UnsafeFileError, having removed nothing, for a link and what is of another user.
    """
    units = folder / UNITS
    merged = [path for path in folder.iterdir() if _is_strange(path) and path != units]
    gone = [path for path in units.iterdir() if path.name not in keys] if _is_there(units) else []
    for path in merged + gone:
        if path.is_symlink() or path.is_dir():
            check_ours(path)
    if merged and units.exists():  # units have been emptied, or some of them
        _discard(units)
        gone = []
    for path in merged + gone:
        _discard(path)
    _set_state(folder, work)


def _is_there(folder: Path) -> bool:
    """Return whether there is a folder. Raises UnsafeFileError for what is not of this user."""
    try:
        check_ours(folder)
    except FileNotFoundError:
        return False
    return True


def _discard(path: Path) -> None:
    """Remove a folder or file; should that be cut off, it has gone from its place as a whole."""
    gone = path.with_name(f"{path.name}.old")
    if path.suffix != ".old":
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        path = gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_strange(path: Path) -> bool:
    return not path.name.startswith(STATE)


def _is_of(folder: Path, work: str) -> bool:
    return _state(folder) in (work, f"{work} merged")


def _state(folder: Path) -> str | None:
    """Which work a folder is of, and whether it is merged; None where it says nothing.

    Raises UnsafeFileError where another thing is in the file's place.
    """
    try:
        return read_regular(folder / STATE, MAX_STATE_BYTES).decode(errors="replace")
    except OSError:
        return None


def _set_state(folder: Path, state: str) -> None:
    mine = folder / f"{STATE}.{os.getpid()}"
    mine.unlink(missing_ok=True)
    with mine.open("x") as file:  # not through a link
        file.write(state)
    os.replace(mine, folder / STATE)
