"""The first cause, told to every rank through the run directory.

A rank that fails leaves its message beside the logs before it exits. Its peers, whose collectives
then break, report that message rather than a broken connection. A file and not the job's store,
which lives in rank 0 and dies with it.
"""

import contextlib
import os
import time
from pathlib import Path

from pretrain.console import shown
from untrusted.errors import UntrustedError
from untrusted.files import read_regular

FILE = "first_failure.txt"
MAX_BYTES = 1 << 20
CLOCK_SKEW = 5.0  # seconds by which a shared file system's clock may lag behind
ECHOES = ("gloo", "nccl", "connection", "socket", "broken pipe", "tcpstore")


def is_echo(error: BaseException) -> bool:
    """Whether an error may be that of a collective, or of the store, which another rank broke."""
    distributed = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    said = str(error).lower()
    return distributed or (isinstance(error, RuntimeError) and any(word in said for word in ECHOES))


def announce(logs: Path, message: str, started: float) -> None:
    """Leave `message` for the ranks of the job `started` then (Unix time); the first stands."""
    with contextlib.suppress(OSError):  # a full disk may be what failed
        if (logs / FILE).exists() and _is_old(logs, started):
            (logs / FILE).unlink(missing_ok=True)
        descriptor = os.open(logs / FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "w") as file:
            file.write(shown(message))


def first_failure(logs: Path, started: float, seconds: float) -> str | None:
    """What another rank announced since `started`, waited for at most `seconds`; None if nobody."""
    deadline = time.monotonic() + seconds
    while (message := _read(logs, started)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return message


def _read(logs: Path, started: float) -> str | None:
    try:
        if _is_old(logs, started):
            return None
        return read_regular(logs / FILE, MAX_BYTES).decode(errors="replace") or None
    except (OSError, UntrustedError):
        return None


def _is_old(logs: Path, started: float) -> bool:
    """Whether what is there is of an earlier start."""
    return (logs / FILE).stat().st_mtime < started - CLOCK_SKEW
