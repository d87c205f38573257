"""The first cause, told to every rank through the run directory.

A rank that fails leaves its message beside the logs before it exits. Its peers, whose collectives
then break, report that message rather than a broken connection. A file and not the job's store,
which lives in rank 0 and dies with it.
"""

import contextlib
import time
from pathlib import Path

FILE = "first_failure.txt"
CLOCK_SKEW = 5.0  # seconds by which a shared file system's clock may lag behind


def announce(logs: Path, message: str, started: float) -> None:
    """Leave `message` for the ranks of the job `started` then (Unix time); the first stands."""
    if _read(logs, started) is None:
        with contextlib.suppress(OSError):  # a full disk may be what failed
            (logs / FILE).write_text(message)


def first_failure(logs: Path, started: float, seconds: float) -> str | None:
    """What another rank announced since `started`, waited for at most `seconds`; None if nobody."""
    deadline = time.monotonic() + seconds
    while (message := _read(logs, started)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return message


def _read(logs: Path, started: float) -> str | None:
    try:
        if (logs / FILE).stat().st_mtime < started - CLOCK_SKEW:
            return None  # of an earlier start
        return (logs / FILE).read_text() or None
    except OSError:
        return None
