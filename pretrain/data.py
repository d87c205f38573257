"""What a run reads, step by step, and what it should be warned of."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from data_pipeline.batch import Batch
from data_pipeline.blend import Blend
from data_pipeline.errors import BadShardError, DataError
from data_pipeline.loader import BatchLoader, BatchSize
from parallel.groups import host_group, largest_of_all
from pretrain import stop
from pretrain.config import Config
from pretrain.phases import Phase

log = logging.getLogger("transxssm")

STOP_SECONDS = 0.2  # between looks whether to stop, while data does not come
_READ, _BAD, _STOP = range(3)  # what a rank says of its part of a step; the largest counts


def warn_of_epochs(config: Config, data: Blend) -> None:
    """Say which sources the run will read more often than their max_epochs."""
    bounds = {source.name: source.max_epochs for source in config.data.sources}
    samples = config.phase_at(config.total_steps).samples_at(config.total_steps)
    for name, epochs in data.epochs(samples).items():
        if epochs > bounds.get(name, math.inf):
            log.warning(
                "the run reads data.sources %s %.1f times, more than its max_epochs %.1f",
                *(name, epochs, bounds[name]),
            )


def warn_of_cache(config: Config, data: Blend) -> None:
    """Say so when copies of remote or compressed shards would go before they are used up."""
    window = config.data.shuffle_window
    needed = sum(
        2 * min(window, source.meta.tokens) * source.dtype.itemsize
        for source in data.sources
        if source.is_copied
    )
    if needed > config.data.cache_gib * 2**30:
        log.warning(
            "data.cache_gib=%g is less than two windows of shards (%.1f GiB): some will be fetched "
            "again and again; raise it, or lower data.shuffle_window",
            *(config.data.cache_gib, needed / 2**30),
        )


def _still_read(phases: Sequence[Phase], sample: int) -> list[Phase]:
    """Those that have not ended at a sample: batches of earlier ones may not fit these ranks."""
    ends = [phase.first_sample for phase in phases[1:]]
    ended = sum(end <= sample for end in ends)
    return list(phases[ended:])


class TrainingBatches:
    """This rank's micro-batches, step by step; bad shards are passed over by all ranks alike.

    skipped: shards that the run has passed over already, as in `skipped` of a checkpoint; those of
    data that the run no longer reads are forgotten.
    """

    def __init__(
        self,
        config: Config,
        data: Blend,
        samples_consumed: int,
        skipped: list[tuple[str, int]],
    ) -> None:
        self._config, self._data = config, data
        self.seconds_reading = 0.0
        """Of the last step, of this rank alone."""
        self.skipped: list[tuple[str, int]] = []
        """(fingerprint of the source, number of the shard)."""
        for source, shard in skipped:  # older checkpoints have the source's name
            fingerprint = self._data.known_fingerprint(source)
            if fingerprint is not None:
                self._data.skip(fingerprint, shard)
                self.skipped.append((fingerprint, shard))
            elif dist.get_rank() == 0:
                log.info("no source is %s any more: shard %d of it is forgotten", source, shard)
        self._loader = self._open(samples_consumed)

    def _open(self, samples_consumed: int) -> BatchLoader:
        return BatchLoader(
            self._data,
            [
                BatchSize(phase.first_sample, phase.global_batch_size, phase.micro_batch_size)
                for phase in _still_read(self._config.phases, samples_consumed)
            ],
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            samples_consumed=samples_consumed,
            num_workers=self._config.data.num_workers,
        )

    @property
    def samples_consumed(self) -> int:
        """Global samples of the steps handed out so far."""
        return self._loader.samples_consumed

    def next_step(self) -> list[Batch] | None:
        """None, on every rank, if any was asked to stop, though it still waits for its data.

        A collective. Raises DataError.
        """
        started = time.perf_counter()
        while True:
            begin, bad = self.samples_consumed, None
            batches: list[Batch] = []
            while not self._loader.wait(STOP_SECONDS) and not stop.requested():
                pass
            if not stop.requested():
                try:
                    batches = self._loader.next_step()
                except BadShardError as error:
                    if not self._config.data.skip_bad_shards:
                        raise
                    bad = error
            self.seconds_reading = time.perf_counter() - started
            asked = _STOP if stop.requested() else _BAD if bad is not None else _READ
            agreed = largest_of_all(asked)
            if agreed == _STOP:
                return None
            if agreed == _READ:
                return batches
            self._loader.close()
            for (fingerprint, shard), message in self._bad_shards(bad).items():
                self._skip(fingerprint, shard, message)
            self._loader = self._open(begin)

    def _bad_shards(self, bad: BadShardError | None) -> dict[tuple[str, int], str]:
        """Those that any rank has met in this step, the same on every rank. A collective."""
        mine = bad and (self._data.fingerprint_of(bad.folder), bad.shard, str(bad))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine, group=host_group())
        return {(source, shard): message for source, shard, message in filter(None, every)}

    def _skip(self, fingerprint: str, shard: int, message: str) -> None:
        limit = self._config.data.skip_bad_shards
        if len(self.skipped) >= limit:
            raise DataError(
                f"{message} The run has passed over {len(self.skipped)} bad shards before, as many "
                f"as data.skip_bad_shards={limit} allows."
            )
        self._data.skip(fingerprint, shard)
        self.skipped.append((fingerprint, shard))
        if dist.get_rank() == 0:
            log.warning(
                "skipping bad shard %d of %d allowed; its samples have no loss: %s",
                *(len(self.skipped), limit, message),
            )

    def close(self) -> None:
        """Stop reading ahead."""
        self._loader.close()
