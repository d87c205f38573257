"""Fast paths that are switched off in this process.

A path that only a GPU can execute is compared there with a plain one before anything is trained
(`parallel.self_check`). Where it fails it is switched off here, and what would take it asks
`is_off` and takes the plain one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

FLOAT32_SUMS = "float32 sums inside products"
COLUMN_SLICES = "column slices of one buffer"
SCAN_SEGMENTS = "segments of the scan"

_off: set[str] = set()


def is_off(path: str) -> bool:
    """Whether a path is not to be taken: one named here, or an operation of `kernels.dispatch`."""
    return path in _off


def switch_off(path: str) -> None:
    """Take the plain path from now on."""
    _off.add(path)


@contextmanager
def without(path: str) -> Iterator[None]:
    """Take the plain path within."""
    was_off = path in _off
    _off.add(path)
    try:
        yield
    finally:
        if not was_off:
            _off.discard(path)
