"""A folder that appears at its name when it is whole: exports, imported and averaged checkpoints.

    .OUT.unfinished/           beside OUT, of this user alone
        content/               what becomes OUT, by a rename
        .transxssm-unfinished  flock of the command at work, and the sign that the folder is ours

A killed command leaves that folder. The next one with the same OUT can lock it, so it removes it.
"""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoints_tools.errors import CheckpointError
from untrusted.errors import UnsafeFileError
from untrusted.files import NO_LOCKS, open_lock, sync_folder
from untrusted.private import check_ours

log = logging.getLogger("transxssm")

CONTENT, LOCK = "content", ".transxssm-unfinished"
LONGEST_NAME = 100  # bytes; a longer one is named by its checksum


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError unless there is nothing at `out`, or a folder with nothing in it."""
    if out.is_symlink() and not out.exists():
        raise CheckpointError(f"{out} is a link to nothing; remove it, or name a new folder")
    if not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise CheckpointError(f"{out} exists and is not empty; name a new folder")
    if os.path.ismount(out):
        raise CheckpointError(f"{out} is a mount point; name a new folder in it")


@contextmanager
def new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """Yield an empty folder which becomes `out` at the end of the block, unless that raises.

    num_bytes: what will be written, about. What a killed command left for the same `out` is removed
    first. Raises CheckpointError where `out` exists, another command is writing it, the disk has
    less room, or writing fails (any OSError in the block); nothing is left then.
    """
    try:
        refuse_existing(out)
        target = out.resolve()  # a link to an empty folder stays a link
        refuse_existing(target)  # `new/..` is a folder once `new` is made
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = target.with_name(f".{_short(target.name)}.unfinished")
        lock = _enter(workplace, out)
        try:
            content = workplace / CONTENT
            content.mkdir()
            _check_room(content, out, num_bytes)
            yield content
            refuse_existing(out)
            content.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
            if workplace.exists():
                log.warning(
                    "%s could not be removed: the next command that writes %s does, or remove it",
                    *(workplace, out),
                )
            os.close(lock)
    except UnsafeFileError as error:  # in the place of what a command left
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"writing {out} failed: {error}; nothing is left there") from error


def _short(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONGEST_NAME else hashlib.sha256(encoded).hexdigest()[:16]


def _enter(workplace: Path, out: Path) -> int:
    """Make the folder, or take it over from a command that is gone; returns its lock file, open."""
    while True:
        is_new = True
        try:
            workplace.mkdir(0o700)
        except FileExistsError:
            is_new = False
            _refuse_strange(workplace, out)
        try:
            lock = open_lock(workplace / LOCK, 0o600)
        except FileNotFoundError:  # its command ended just now
            continue
        try:
            _lock(lock, workplace, out, is_new)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.lstat(workplace / LOCK)):
                    if (workplace / CONTENT).exists():
                        log.info("removing %s, which a command that ended early left", workplace)
                        shutil.rmtree(workplace / CONTENT)
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _refuse_strange(workplace: Path, out: Path) -> None:
    """Raise CheckpointError for what no command of this user left."""
    with suppress(FileNotFoundError):
        check_ours(workplace)
        is_ours = not (workplace / CONTENT).is_symlink()
        if not is_ours or not set(os.listdir(workplace)) <= {CONTENT, LOCK}:
            raise CheckpointError(
                f"{workplace} is in the way and not from this command; move it elsewhere, or name "
                f"another folder than {out}"
            )


def _lock(lock: int, workplace: Path, out: Path, is_new: bool) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"another command is writing {out}; wait until it has ended, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if not is_new:
            raise CheckpointError(
                f"{workplace} is in the way, and this file system has no locks "
                f"({error.strerror}) to say whether a command is still writing {out}; if none is, "
                "remove it"
            ) from error


def _check_room(content: Path, out: Path, num_bytes: int) -> None:
    """Refuse at once what the disk cannot hold."""
    if (free := shutil.disk_usage(content).free) < num_bytes:
        raise CheckpointError(
            f"writing {out} needs {num_bytes / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free "
            "there; free space, or choose another folder"
        )
