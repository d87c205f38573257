"""Folders with predictable names where other users can write, as below TMPDIR or in a project."""

import contextlib
import errno
import logging
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from untrusted.errors import UnsafeFileError
from untrusted.files import KINDS

log = logging.getLogger("transxssm")

TRIED = 4  # names
FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC


def private_folder(path: Path, subfolders: Sequence[str] = ()) -> Path:
    """Return a folder that only this user can enter: `path`, or another where that is not ours.

    `path`, and `subfolders` in it, are made with mode 0700, or must be folders (no links) of this
    user that others cannot write to. Otherwise path.1, path.2, ... are tried, so that processes of
    one node agree, and at last a new temporary folder. Raises OSError where none can be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for candidate in (path, *(path.with_name(f"{path.name}.{n}") for n in range(1, TRIED))):
        fault = make_private(candidate, subfolders)
        if fault is None:
            return candidate
        log.warning("%s: it is not used", fault)
    made = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
    make_private(made, subfolders)
    log.warning("using %s, which other processes of this node do not share", made)
    return made


def make_private(folder: Path, subfolders: Sequence[str] = (), *, close: bool = True) -> str | None:
    """Make or verify a folder and subfolders of it; return what is wrong, None if nothing is.

    close: also take from others the right to read the folder, as from the subfolders. Raises
    OSError where the folder cannot be made.
    """
    for path in (folder, *(folder / name for name in subfolders)):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        try:
            descriptor = open_private(path)
        except UnsafeFileError as error:
            return str(error)
        try:
            if (close or path != folder) and os.fstat(descriptor).st_mode & 0o077:
                os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
    return None


def open_private(folder: Path | str, parent: int | None = None) -> int:
    """Return the descriptor of a folder that only this user can write to.

    parent: descriptor of the folder that a relative name is in. Raises UnsafeFileError for a link,
    a file, and a folder of another user or that others can write to; FileNotFoundError.
    """
    try:
        descriptor = os.open(folder, FOLDER, dir_fd=parent)
    except PermissionError as error:
        raise UnsafeFileError(f"{folder} cannot be opened by this user") from error
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise UnsafeFileError(f"{folder} is a link or a file, not a folder") from error
    found = os.fstat(descriptor)
    fault = None
    if found.st_uid != os.geteuid():
        fault = f"belongs to the user {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    if fault is not None:
        os.close(descriptor)
        raise UnsafeFileError(f"{folder} {fault}")
    return descriptor


def check_ours(folder: Path) -> None:
    """Raise UnsafeFileError for anything but a folder of this user, which its group may write to.

    To be called before what is in the folder is removed, moved or trusted. Raises OSError, as
    FileNotFoundError where there is nothing.
    """
    status = folder.lstat()
    mode = status.st_mode
    if not stat.S_ISDIR(mode):
        kind = "a link" if stat.S_ISLNK(mode) else KINDS.get(stat.S_IFMT(mode), "a file")
        fault, remedy = f"is {kind}, not a folder", "move it elsewhere"
    elif status.st_uid not in (os.geteuid(), _owner_of_new_files(folder, status.st_uid)):
        fault, remedy = f"belongs to the user {status.st_uid}", "name another, or move it elsewhere"
    elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        fault = f"can be written by every user (mode {stat.S_IMODE(mode):04o})"
        remedy = "look what is in it and take that right away (`chmod o-w`), or remove it"
    else:
        return
    raise UnsafeFileError(f"{folder} {fault}, and what is in it is not trusted; {remedy}.")


def _owner_of_new_files(folder: Path, owner: int) -> int | None:
    """Return whom this user's files belong to in a folder: on a network file system that may be
    another user. None where that cannot be found out."""
    if owner == os.geteuid():
        return owner
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None
