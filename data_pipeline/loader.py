"""Batches of a run, from one global sample counter.

Sample k of the run is a function of seed, sources and k alone (blend.py).
Step s reads samples [consumed, consumed + global_batch_size), of which data-parallel rank r takes
the r-th contiguous share. So the set of a global batch does not depend on the number of ranks, and
`samples_consumed` is all there is to save.
"""

import queue
import threading
import weakref
from collections.abc import Iterator

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.blend import Blend
from data_pipeline.collate import collate
from data_pipeline.dataset import PackedDataset


class BatchLoader:
    """One data-parallel rank's micro-batches, step by step, read ahead by a thread.

    Tensor- and pipeline-parallel peers pass the same data-parallel rank and get equal batches.
    Raises ValueError when the sizes do not divide.
    """

    def __init__(
        self,
        blend: Blend,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        samples_consumed: int = 0,
        prefetch_steps: int = 2,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise ValueError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size × "
                f"data_parallel_size = {micro_batch_size} × {data_parallel_size}"
            )
        if not 0 <= data_parallel_rank < data_parallel_size or samples_consumed < 0:
            raise ValueError(
                f"data_parallel_rank={data_parallel_rank} of {data_parallel_size}, "
                f"samples_consumed={samples_consumed}"
            )
        self.samples_consumed = samples_consumed
        """Global samples of the steps handed out so far: the whole state."""
        self._global_batch_size = global_batch_size
        share = global_batch_size // data_parallel_size
        first = samples_consumed + data_parallel_rank * share
        self._steps: queue.Queue[list[Batch] | BaseException] = queue.Queue(prefetch_steps)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(blend, first, global_batch_size, share, micro_batch_size),
            kwargs={"steps": self._steps, "stop": self._stop},
            name="data-prefetch",
            daemon=True,
        )
        weakref.finalize(self, self._stop.set)  # a dropped loader does not leave its thread behind
        self._thread.start()

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global step.

        Raises what the reading thread met, DataError for damaged data; also when called again.
        """
        if self._stop.is_set():
            raise RuntimeError("next_step() on a closed BatchLoader")
        if self._error is None:
            item = self._steps.get()
            if not isinstance(item, BaseException):
                self.samples_consumed += self._global_batch_size
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """Stop the thread and wait for it. Steps read ahead are dropped."""
        self._stop.set()
        while not self._steps.empty():
            self._steps.get_nowait()
        self._thread.join()


def _read_ahead(
    blend: Blend,
    first: int,
    stride: int,
    share: int,
    micro_batch_size: int,
    *,
    steps: "queue.Queue[list[Batch] | BaseException]",
    stop: threading.Event,
) -> None:
    """Put step after step into `steps`; an exception goes the same way and ends the thread.

    A function, not a method: the thread must not keep the loader alive.
    """
    item: list[Batch] | BaseException
    while not stop.is_set():
        try:
            counters = np.arange(first, first + share, dtype=np.int64)
            samples = blend.read(counters)
            item = [
                collate(samples[at : at + micro_batch_size])
                for at in range(0, share, micro_batch_size)
            ]
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                steps.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        first += stride


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
        indices = [*range(start, start + counted), *[0] * (batch_size - counted)]
        yield collate([dataset[i] for i in indices], counted)
