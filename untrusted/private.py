"""Folders with predictable names where other users of the node can write, as below TMPDIR."""

import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger("transxssm")

TRIED = 4  # names


def private_folder(path: Path) -> Path:
    """Return a folder that only this user can enter: `path`, or another where that is not ours.

    `path` is made with mode 0700, or must be a folder (no link) of this user that others cannot
    write to. Otherwise path.1, path.2, ... are tried, so that processes of one node agree, and at
    last a new temporary folder. Raises OSError where none can be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for candidate in (path, *(path.with_name(f"{path.name}.{n}") for n in range(1, TRIED))):
        fault = _make_private(candidate)
        if fault is None:
            return candidate
        log.warning("%s %s: it is not used", candidate, fault)
    made = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
    log.warning("using %s, which other processes of this node do not share", made)
    return made


def _make_private(folder: Path) -> str | None:
    """Make or verify one folder; return what is wrong with it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return "is a link, not a folder, or cannot be opened"
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            return f"belongs to the user {found.st_uid}"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
        if found.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    return None
