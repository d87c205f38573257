"""Files in object storage, by mosaicml-streaming's downloaders and uploaders.

A URL has a scheme that streaming knows (s3://, gs://, oci://, ...); file:///folder is a directory
that is treated as if it were remote. What fails is tried again, after waits that double.
"""

import contextlib
import errno
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

from data_pipeline.errors import BadFileError, DataError
from data_pipeline.mds import without_packages
from untrusted.errors import UntrustedError
from untrusted.files import open_regular

log = logging.getLogger("transxssm")

FIRST_WAIT = 0.5  # seconds before the second attempt
WATCH_SECONDS = 0.2
FAULTS_OF_THE_NODE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        *(errno.EACCES, errno.EPERM, errno.ENOTDIR),
    }
)
Result = TypeVar("Result")


def is_remote(location: str) -> bool:
    """Whether it is a URL rather than a path."""
    return "://" in location


def download(
    url: str,
    target: Path,
    *,
    max_bytes: int,
    timeout: float,
    attempts: int,
    follow_link: bool = False,
) -> None:
    """Copy the file at `url`, of at most `max_bytes`, to `target`. Raises BadFileError naming the
    URL, DataError when it is this node that cannot have the copy.

    timeout: seconds that the storage may be silent. follow_link: a file:// URL may be a link.
    """

    def once() -> None:
        if "://" not in _known(url):
            _check_local(Path(_known(url)), url, max_bytes, follow_link)
        with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as folder:
            part = Path(folder) / target.name
            _watched(
                lambda: _downloader(urlparse(url).scheme).download(_known(url), str(part), timeout),
                url,
                Path(folder),
                max_bytes,
                timeout,
            )
            os.replace(part, target)

    _retried(once, f"{url}: cannot be downloaded", attempts, BadFileError)


def _check_local(path: Path, url: str, max_bytes: int, follow_link: bool) -> None:
    """Raises BadFileError for what the library would copy for ever, OSError for what is missing."""
    try:
        with open_regular(path, follow_link=follow_link) as file:
            size = os.fstat(file.fileno()).st_size
    except UntrustedError as error:
        raise BadFileError(str(error)) from error
    if size > max_bytes:
        raise _too_large(url, max_bytes)


def _too_large(url: str, max_bytes: int) -> BadFileError:
    return BadFileError(
        f"{url}: cannot be downloaded: it is larger than {max_bytes} bytes, which is what the "
        "dataset says of it or the most that such a file has. Copy it again or prepare the data "
        "again."
    )


@lru_cache
def _downloader(scheme: str) -> Any:
    """One for all files, since connecting takes longer than fetching a small one."""
    storage = without_packages("streaming.base.storage.download")
    return storage.CloudDownloader.get(_known(f"{scheme}://"))


def _watched(
    action: Callable[[], None], url: str, folder: Path, max_bytes: int, timeout: float
) -> None:
    """Give up on a download into `folder`, whose own time-out may not work, when nothing comes, or
    more than `max_bytes`."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:  # raised below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True, name="download")
    thread.start()
    size, since = 0, time.monotonic()
    while True:
        thread.join(WATCH_SECONDS)
        if not thread.is_alive():
            break
        arrived = _bytes_in(folder)
        if arrived > max_bytes:
            raise _too_large(url, max_bytes)
        if arrived != size:
            size, since = arrived, time.monotonic()
        elif time.monotonic() - since > timeout:
            raise TimeoutError(f"nothing came for {timeout:g} s")
    if failures:
        raise failures[0]
    if _bytes_in(folder) > max_bytes:
        raise _too_large(url, max_bytes)


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder, one of which may be renamed meanwhile."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def upload(folder: Path, names: list[str], url: str, *, attempts: int) -> None:
    """Copy the files `names` of `folder` into the folder at `url`. Raises DataError."""
    storage = without_packages("streaming.base.storage.upload")

    def once() -> None:
        uploader = storage.CloudUploader.get(
            (str(folder), _known(url)), keep_local=True, retry=1, exist_ok=True
        )
        for name in names:
            uploader.upload_file(name)

    logging.getLogger(storage.__name__).setLevel(logging.ERROR)  # that `folder` exists
    _retried(once, f"{url}: cannot be written", attempts)


def list_names(url: str, *, attempts: int) -> set[str]:
    """Names of the files in the folder at `url`, none if there is no such folder. Raises
    DataError."""
    return {path for path in list_paths(url, attempts=attempts) if "/" not in path}


def list_paths(url: str, *, attempts: int) -> set[str]:
    """Files in the folder at `url` and in its subfolders, relative to it. Raises DataError."""
    known = _known(url)
    if "://" not in known:
        folder = Path(known)
        found = [*folder.glob("*"), *folder.glob("*/*")]
        return {path.relative_to(folder).as_posix() for path in found if path.is_file()}
    storage = without_packages("streaming.base.storage.upload")

    def once() -> set[str]:
        folder = known.rstrip("/") + "/"
        uploader = storage.CloudUploader.get(folder, keep_local=True)
        os.rmdir(uploader.local)  # a folder of its own that it does not need
        prefix = urlparse(folder).path.lstrip("/")
        paths = (key.removeprefix(prefix) for key in uploader.list_objects() or [])
        return {path for path in paths if path.count("/") < 2}

    return _retried(once, f"{url}: cannot be listed", attempts)


def _known(url: str) -> str:
    """`url` as streaming spells it, to whom a directory is a plain path."""
    return url.removeprefix("file://")


def _retried(
    action: Callable[[], Result], what: str, attempts: int, failure: type[DataError] = DataError
) -> Result:
    """What `action` returns. Raises `failure` when it goes on failing, DataError at once for a
    fault of this node."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except DataError:  # another attempt would find the same
            raise
        except Exception as error:  # each storage's client has its own
            reason = " ".join(str(error).split()) or type(error).__name__
            if _is_of_the_node(error):
                raise DataError(
                    f"{what} ({reason}). This is no fault of the file: free space, fix "
                    "permissions or raise this node's limits; copies go to data.cache_dir and "
                    "$TMPDIR."
                ) from error
            if attempt == attempts:
                raise failure(
                    f"{what} after {attempts} attempts ({reason}). Check the address, the "
                    "credentials in the environment and the network."
                ) from error
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            log.warning("%s (%s); attempt %d in %.1f s", what, reason, attempt + 1, wait)
            time.sleep(wait)
    raise ValueError(f"attempts={attempts}: use 1 or more")


def _is_of_the_node(error: BaseException | None) -> bool:
    """Whether it, or what it came from, says that this node has no room, files or permission."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FAULTS_OF_THE_NODE:
            return True
        error = error.__cause__ or error.__context__
    return False
