"""Ranks that are slower than their peers, by host.

In a synchronous job every rank takes as long as the slowest, most of them waiting in collectives.
So what counts is time before the first collective that has to wait for the others: reading, up to
the start of the step; and computing, up to the sum of gradients. Within a replica of the model
ranks do wait for each other while they compute: then the ranks of a slow replica are all reported.
Under ZeRO 2 and 3, which sum gradients during backward, replicas wait for each other, too.
"""

import logging
import statistics
from typing import Any

import torch.distributed as dist

from parallel.groups import host_group
from parallel.launch import host_name

log = logging.getLogger("transxssm")

SLOWER = 1.3  # times the median rank
LEAST_SECONDS = 0.005  # more than that, a step


class Stragglers:
    """Adds up one rank's seconds; every `every` steps rank 0 compares. 0: never."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._steps, self._reading, self._computing = 0, 0.0, 0.0

    def add(self, reading: float, computing: float) -> list[str]:
        """Seconds of this step. On rank 0 of a step that compares: who is slow, in words.

        A collective in these steps.
        """
        if not self.every or dist.get_world_size() == 1:
            return []
        self._steps += 1
        self._reading, self._computing = self._reading + reading, self._computing + computing
        if self._steps < self.every:
            return []
        mine = (host_name(), self._reading / self._steps, self._computing / self._steps)
        self._steps, self._reading, self._computing = 0, 0.0, 0.0
        first = dist.get_rank() == 0
        every_rank: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(mine, every_rank, dst=0, group=host_group())
        return slow_ranks(every_rank) if every_rank is not None else []


def slow_ranks(found: list[tuple[str, float, float]]) -> list[str]:
    """found: host, seconds of reading and of computing a step, of every rank."""
    said = []
    for number, what in ((1, "reading"), (2, "computing")):
        usual = statistics.median(float(rank[number]) for rank in found)
        for rank, (host, *seconds) in enumerate(found):
            took = seconds[number - 1]
            if took > SLOWER * usual and took > usual + LEAST_SECONDS:
                said.append(
                    f"rank {rank} on {host}: {what} {took:.3f} s a step, usually {usual:.3f}"
                )
    return said
