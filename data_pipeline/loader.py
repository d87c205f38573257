"""Batches of a run, from one global sample counter.

Sample k of the run is a function of seed, sources and k alone (blend.py).
Step s reads samples [consumed, consumed + global_batch_size), of which data-parallel rank r takes
the r-th contiguous share. So the set of a global batch does not depend on the number of ranks, and
`samples_consumed` is all there is to save.

Threads read ahead: reading is system calls and copies, in which others run. Nothing is left behind
by a killed run: no shared memory, no lock that outlives its process.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.batch import Batch
from data_pipeline.blend import Blend
from data_pipeline.collate import collate
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError

READY_STEPS = 32  # ahead of reading: steps whose shards are fetched and checked
Counters = NDArray[np.int64]


@dataclass(frozen=True)
class BatchSize:
    """Sequences of a global batch and of a rank's micro-batch, from sample `first` of the run."""

    first: int
    global_batch_size: int
    micro_batch_size: int


class BatchLoader:
    """One data-parallel rank's micro-batches, step by step.

    Tensor-, context- and pipeline-parallel peers pass the same data-parallel rank and get equal
    batches. num_workers threads read ahead, two steps each (0: next_step reads).
    Raises ValueError when the sizes do not divide.
    """

    def __init__(
        self,
        blend: Blend,
        sizes: Sequence[BatchSize],
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        samples_consumed: int = 0,
        num_workers: int = 1,
    ) -> None:
        for size in sizes:
            if size.global_batch_size % (size.micro_batch_size * data_parallel_size):
                raise ValueError(
                    f"global_batch_size={size.global_batch_size} is not a multiple of "
                    f"micro_batch_size × data_parallel_size = {size.micro_batch_size} × "
                    f"{data_parallel_size}"
                )
        if not 0 <= data_parallel_rank < data_parallel_size or samples_consumed < 0:
            raise ValueError(
                f"data_parallel_rank={data_parallel_rank} of {data_parallel_size}, "
                f"samples_consumed={samples_consumed}"
            )
        self.samples_consumed = samples_consumed
        """Global samples of the steps handed out so far: the whole state."""
        self._blend, self._sizes = blend, list(sizes)
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._depth = 2 * num_workers
        self._readers = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._steps: deque[Future[list[Batch]]] = deque()
        self._next = samples_consumed  # first sample of the step to read next
        self._fetcher = ThreadPoolExecutor(1, "data-ready") if num_workers else None
        self._ready = samples_consumed  # first sample of the step to make ready next
        self._closed = False

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global step.

        Raises BadShardError for damaged data, also when called again.
        """
        if self._closed:
            raise RuntimeError("next_step() on a closed BatchLoader")
        size = self._size_at(self.samples_consumed)
        if self._readers is None:
            batches = self._read(size, self.samples_consumed)
        else:
            self._read_ahead()
            batches = self._steps[0].result()  # stays first if it raises
            self._steps.popleft()
        self.samples_consumed += size.global_batch_size
        return batches

    def wait(self, seconds: float) -> bool:
        """Whether next_step would not wait for data, after so many seconds at most."""
        if self._readers is None:
            return True
        self._read_ahead()
        return bool(wait([self._steps[0]], seconds).done)

    def _read_ahead(self) -> None:
        """Give the threads what they have not got yet of the steps ahead."""
        assert self._readers is not None
        assert self._fetcher is not None
        size = self._size_at(self.samples_consumed)
        if self._ready < self._next + READY_STEPS // 2 * size.global_batch_size:
            steps = []
            for _ in range(READY_STEPS):
                steps.append(self._share(self._size_at(self._ready), self._ready))
                self._ready += self._size_at(self._ready).global_batch_size
            self._fetcher.submit(self._make_ready, np.concatenate(steps))
        while len(self._steps) < self._depth:
            ahead = self._size_at(self._next)
            self._steps.append(self._readers.submit(self._read, ahead, self._next))
            self._next += ahead.global_batch_size

    def _size_at(self, sample: int) -> BatchSize:
        return next(size for size in reversed(self._sizes) if size.first <= sample)

    def _share(self, size: BatchSize, first: int) -> Counters:
        """This rank's samples of the step that begins at `first`."""
        share = size.global_batch_size // self._ranks
        begin = first + self._rank * share
        return np.arange(begin, begin + share, dtype=np.int64)

    def _read(self, size: BatchSize, first: int) -> list[Batch]:
        samples, sources = self._blend.read(self._share(size, first))
        micro = size.micro_batch_size
        batches = [
            collate(samples[at : at + micro], sources=sources[at : at + micro])
            for at in range(0, len(samples), micro)
        ]
        if torch.cuda.is_available():
            batches = [batch.pinned() for batch in batches]
        return batches

    def _make_ready(self, counters: Counters) -> None:
        with contextlib.suppress(DataError):  # the step that reads the shard raises it
            self._blend.make_ready(counters)

    def close(self) -> None:
        """Stop the threads; not waited for, since reads may be stalled. Their steps are dropped."""
        self._closed = True
        for pool in (self._readers, self._fetcher):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)


def sequential_batches(
    dataset: PackedDataset,
    batch_size: int,
    limit: int | None = None,
    *,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> Iterator[Batch]:
    """The first `limit` samples (None: all) in order, in batches of exactly `batch_size`.

    Ranks get disjoint shares and equally many batches, since collectives need all of them; rows
    that only fill the last ones up have loss_mask 0. The union does not depend on the number of
    ranks: sum loss and loss_mask over batches and ranks, then divide.
    """
    total = len(dataset) if limit is None else min(limit, len(dataset))
    for first in range(0, total, batch_size * data_parallel_size):
        start = first + data_parallel_rank * batch_size
        counted = max(0, min(batch_size, total - start))
        indices = np.array([*range(start, start + counted), *[0] * (batch_size - counted)])
        yield collate(dataset.read(indices), counted)
