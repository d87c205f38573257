"""Device-memory traffic of interpreted kernels, counted access by access.

    with count_traffic() as traffic:
        out = ssd(...)
    traffic["ssd_forward"].loaded

Needs kernels.audit.interpreter.install().
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kernels.audit.memory import Memory


@dataclass
class KernelTraffic:
    """Sums over a kernel's launches, in bytes where nothing else is said."""

    launches: int = 0
    programs: int = 0
    loaded: int = 0  # every program's loads count: lanes that the mask leaves on × element size
    stored: int = 0  # likewise
    atomic: int = 0  # likewise; an atomic operation counts once, neither as load nor as store
    unique_loaded: int = 0  # distinct bytes of a launch: what a cache that held all would load
    unique_stored: int = 0


_open: list[dict[str, KernelTraffic]] = []


@contextmanager
def count_traffic() -> Iterator[dict[str, KernelTraffic]]:
    """Kernel name -> traffic of the launches inside this block."""
    counted: dict[str, KernelTraffic] = {}
    _open.append(counted)
    try:
        yield counted
    finally:
        _open.pop()


def record(memory: Memory) -> None:
    """Add a finished launch to all open counts."""
    for counted in _open:
        kernel = counted.setdefault(memory.kernel, KernelTraffic())
        kernel.launches += 1
        kernel.programs += memory.programs
        kernel.loaded += memory.bytes["load"]
        kernel.stored += memory.bytes["store"]
        kernel.atomic += memory.bytes["atomic"]
        kernel.unique_loaded += memory.distinct("load")
        kernel.unique_stored += memory.distinct("store")
