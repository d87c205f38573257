"""What a run reads: its sources and validation sets, opened, and its batches, step by step."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_pipeline.batch import Batch
from data_pipeline.blend import Blend, Stage
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import BadShardError, DataError
from data_pipeline.loader import BatchLoader, BatchSize
from data_pipeline.storage import Cache, default_cache_dir
from pretrain.config import Config

log = logging.getLogger("transxssm")


def open_data(config: Config) -> tuple[Blend, dict[str, PackedDataset]]:
    """Training sources and validation sets, checked against the configuration and each other.

    Raises DataError.
    """
    data = open_blend(config)
    data.sources[0].tokenizer()  # missing? now rather than at the first save
    validation = {
        name: PackedDataset(
            location,
            seq_len=config.data.seq_len,
            tokenizer_hash=data.meta.tokenizer_hash,
            cache=_cache(config),
        )
        for name, location in config.data.validation_sets.items()
    }
    return data, validation


def open_blend(config: Config) -> Blend:
    """The training sources by their weights. Raises DataError."""
    data = config.data
    listed = [(source.path, source.seq_len or data.seq_len) for source in data.sources]
    sources = [
        PackedDataset(
            path, seq_len=seq_len, vocab_size=config.model.vocab_size, cache=_cache(config)
        )
        for path, seq_len in listed or [(data.train, data.seq_len)]
    ]
    return Blend(
        sources,
        seed=data.seed,
        names=[source.name for source in data.sources] or ["train"],
        stages=[Stage(phase.first_sample, phase.weights) for phase in config.phases],
        window_tokens=data.shuffle_window,
    )


def _cache(config: Config) -> Cache:
    data = config.data
    return Cache(
        Path(data.cache_dir) if data.cache_dir else default_cache_dir(),
        int(data.cache_gib * 2**30),
        data.download_attempts,
        data.download_timeout,
    )


def keep_tokenizer(data: Blend, run_dir: Path) -> Path:
    """The data's tokenizer.json in the run directory, from where checkpoints take it."""
    path = run_dir / "tokenizer.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data.sources[0].tokenizer())
    os.replace(temporary, path)
    return path


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
        device: torch.device,
    ) -> None:
        self._config, self._data, self._device = config, data, device
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
                for phase in self._config.phases
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

    def next_step(self) -> list[Batch]:
        """A collective of all ranks where bad shards may be skipped. Raises DataError."""
        if not self._config.data.skip_bad_shards:
            return self._loader.next_step()
        while True:
            begin, bad = self.samples_consumed, None
            batches: list[Batch] = []
            try:
                batches = self._loader.next_step()
            except BadShardError as error:
                bad = error
            found = self._agreed(bad)
            if not found:
                return batches
            self._loader.close()
            for (fingerprint, shard), message in found.items():
                self._skip(fingerprint, shard, message)
            self._loader = self._open(begin)

    def _agreed(self, bad: BadShardError | None) -> dict[tuple[str, int], str]:
        """The bad shards that any rank has met in this step, the same on every rank."""
        any_bad = torch.tensor(float(bad is not None), device=self._device)
        dist.all_reduce(any_bad, op=dist.ReduceOp.MAX)
        if not any_bad:
            return {}
        mine = bad and (self._data.fingerprint_of(bad.folder), bad.shard, str(bad))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
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
