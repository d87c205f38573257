"""Folders with predictable names where other users of the node can write, as below TMPDIR."""

import contextlib
import errno
import logging
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from untrusted.errors import UnsafeFileError

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
