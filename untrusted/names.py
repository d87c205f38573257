"""Names that come from files, taken into a folder or refused; places that cannot be URLs."""

import re
import unicodedata
from pathlib import Path

from untrusted.errors import UnsafeNameError
from untrusted.text import printable

# also what pathlib makes of it, with one slash
_URL = re.compile(r"\s*(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,31}):/|.*://", re.DOTALL)

MAX_NAME_BYTES = 255  # of one file name, on every common file system


def check_name(name: object, source: str) -> str:
    """Return `name` if it is a relative path of plain parts ("shard.mds", "0/shard.mds").

    source: the file that holds the name, for the message. Raises UnsafeNameError for anything
    absolute, empty, with "..", ".", control characters or a part longer than 255 bytes, and for
    what is not a string.
    """
    fault = _fault(name)
    if fault is not None:
        shown = repr(name[:300]) if isinstance(name, str) else f"of type {type(name).__name__}"
        raise UnsafeNameError(
            f"{printable(source)}: the file name {printable(shown)[:300]} {fault}; names must "
            "be relative and stay in their folder. Do not use this file; get a new copy from a "
            "source that you trust."
        )
    assert isinstance(name, str)
    return name


def name_in(folder: Path, name: object, source: str) -> Path:
    """Return the path of `name` in `folder`; neither need exist.

    Raises UnsafeNameError as `check_name` does, and where a folder on the way is a link.
    """
    *folders, last = check_name(name, source).split("/")
    for part in folders:
        folder = folder / part
        if folder.is_symlink():
            raise UnsafeNameError(
                f"{printable(source)}: {printable(str(name))} leads through {folder}, which is a "
                "link; replace the link with the folder itself."
            )
    return folder / last


def check_file_name(name: object, source: str) -> str:
    """Return `name` if it is the plain name of one file, without a folder.

    Raises UnsafeNameError.
    """
    checked = check_name(name, source)
    if "/" in checked:
        raise UnsafeNameError(
            f"{printable(source)}: {printable(checked)[:300]} names a folder; the file must lie "
            "beside it."
        )
    return checked


def check_local(path: str | Path, field: str) -> None:
    """Refuse a URL where only this machine's folders and files can be written.

    It would become a folder here that is named after it, credentials and all, so the message shows
    no more than its scheme. field: what holds the path. Raises UnsafeNameError.
    """
    if (found := _URL.match(str(path))) is None:
        return
    scheme = f"{found['scheme']}://" if found["scheme"] else "with ://"
    raise UnsafeNameError(
        f"{field} is a URL ({scheme}...), but it must be a path of this machine: nothing is "
        "written to a remote storage there. Name a local or mounted folder, and copy what is to go "
        "elsewhere."
    )


def _fault(name: object) -> str | None:
    if not isinstance(name, str):
        return "is not a string"
    if not name:
        return "is empty"
    if name.startswith("/"):
        return "is an absolute path"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return "has control characters"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"has the part {part!r}"
        if len(part.encode()) > MAX_NAME_BYTES:
            return f"has a part longer than {MAX_NAME_BYTES} bytes"
    return None
