"""Files that others may have put in place: opened, and replaced."""

import errno
import os
import stat
from pathlib import Path
from typing import IO

from untrusted.errors import UnsafeFileError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of file systems without locks
NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # of those that cannot sync a folder
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path, *, follow_link: bool = False) -> IO[bytes]:
    """Open a regular file for reading; never blocks.

    Raises UnsafeFileError for a folder, device, pipe or socket, and for a link unless
    `follow_link`; OSError as `open` does.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_link else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeFileError(
                f"{path} is a link, not a file; put a copy of the file itself there (`cp -L`)."
            ) from error
        if error.errno == errno.ENXIO:
            raise UnsafeFileError(f"{path} is a socket or pipe, not a file; remove it.") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise UnsafeFileError(f"{path} is {kind}, not a file; remove it or restore the file.")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, max_bytes: int, *, follow_link: bool = False) -> bytes:
    """Return the content of a regular file of at most `max_bytes`.

    Raises UnsafeFileError as `open_regular` does, and for a larger file; OSError.
    """
    with open_regular(path, follow_link=follow_link) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnsafeFileError(
            f"{path} is larger than {max_bytes:,} bytes, which such a file never is; restore it."
        )
    return content


def check_place(path: Path) -> None:
    """Raise UnsafeFileError where anything but a regular file is at `path`.

    To be called before a file is opened for writing: a pipe would wait for its reader, and what a
    link names may be another's.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there, or opening it will tell
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise UnsafeFileError(f"{path} is {kind}, not a file; remove it.")


def open_lock(path: Path, mode: int = 0o666) -> int:
    """Return the descriptor of a file to lock, which is made where there is none.

    Raises UnsafeFileError for a link or what else is no file, OSError.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UnsafeFileError(f"{path} is a link, not a file; remove it.") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UnsafeFileError(f"{path} is a pipe or device, not a file; remove it.")
    return file


def create_file(path: Path, *, buffering: int = -1, mode: int = 0o666) -> IO[bytes]:
    """Open a new file for writing, in the place of the file or link that is there.

    mode: its rights, of which the umask takes away. What a link names stays as it is. Raises
    OSError.
    """
    path.unlink(missing_ok=True)
    # "x" is O_EXCL: neither a file nor a link made meanwhile
    return open(path, "xb", buffering, opener=lambda name, flags: os.open(name, flags, mode))


def write_durably(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file whole or not at all, in the place of the file or link that is there.

    It is on disk when this returns: a power loss leaves the old file or the new one, and no empty
    one. mode: see create_file. Raises OSError.
    """
    temporary = path.with_name(f".{path.name[:200]}.tmp")
    try:
        with create_file(temporary, mode=mode) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # a write names none
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)
