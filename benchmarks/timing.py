"""Times of calls that take turns, so that a slow minute of the machine falls on all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of every turn, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the turns."""
        return statistics.median(self.seconds)


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """After a warm-up of each. progress: called after every call."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            seconds = seconds_of(call, device)
            progress()
            if turn:
                found[name].append(seconds)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Of one call: events on a GPU, else process time with one thread and wall time with more."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start
