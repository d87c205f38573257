"""Several sources read as one stream: sample k of a run is a function of seed, weights and k alone.

A stage of the run gives each source a share of the samples, by its weight in tokens. A table of
PERIOD entries says which source comes when, evenly: after any number of samples every source is
within a sample or two of its share. How often a source came before is a quotient, a remainder and
a look-up. A source's own samples come in its own seeded permutation, epoch after epoch (order.py).
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.order import Windows, sample_indices
from data_pipeline.packing import Sample

log = logging.getLogger("transxssm")

PERIOD = 1 << 14  # shares are exact to one part in as many
BLOCK_TOKENS = 1 << 25  # neighbours that a window keeps together: about a shard
MIN_BLOCKS = 64  # of a window, lest it hold too few documents of too few files
WINDOW_TOKENS = 1 << 32
PAGE = 1 << 12  # samples whose places are found together
SHARE_TOLERANCE = 0.05  # of a source's share, before the rounding to PERIOD is told


@dataclass(frozen=True)
class Stage:
    """From sample `first` of the run on, each source's weight in tokens (0: not read)."""

    first: int
    weights: tuple[float, ...]


class BlendOrder:
    """Which sample of which source is sample k of the run. Raises ValueError for bad stages."""

    def __init__(
        self,
        seed: int,
        sizes: Sequence[int],
        tokens: Sequence[int],
        stages: Sequence[Stage],
        windows: Sequence[Windows] | None = None,
    ) -> None:
        """sizes, tokens: samples of each source, and tokens without padding in all of them;
        windows: in which each source's samples are shuffled [the whole epoch]."""
        if stages[0].first or any(a.first >= b.first for a, b in pairwise(stages)):
            raise ValueError("stages must begin at sample 0 and rise")
        self.seed, self.sizes = seed, np.array(sizes, np.int64)
        self.windows = list(windows) if windows is not None else [None] * len(sizes)
        self.firsts = np.array([stage.first for stage in stages], np.int64)
        self.tables: list[NDArray[np.int64]] = []
        self.before: list[NDArray[np.int64]] = []  # [sources, PERIOD + 1]
        self.per_sample = np.array(tokens) / self.sizes
        for stage in stages:
            table = interleaved(np.array(stage.weights) / self.per_sample)
            ones = np.eye(len(sizes), dtype=np.int64)[table].T  # [sources, PERIOD]
            self.tables.append(table)
            self.before.append(np.pad(ones.cumsum(1), ((0, 0), (1, 0))))
        self.drawn_at = [np.zeros(len(sizes), np.int64)]  # by every source, when a stage begins
        for number in range(len(stages) - 1):
            length = int(self.firsts[number + 1] - self.firsts[number])
            self.drawn_at.append(self.drawn_at[-1] + self._within(number, length))

    def _within(self, stage: int, samples: int) -> NDArray[np.int64]:
        """Samples of each source among the first `samples` of a stage."""
        rounds, rest = divmod(samples, PERIOD)
        before = self.before[stage]
        drawn: NDArray[np.int64] = rounds * before[:, -1] + before[:, rest]
        return drawn

    def drawn(self, samples: int) -> NDArray[np.int64]:
        """Samples of each source among the first `samples` of the run, int64 [sources]."""
        stage = int(np.searchsorted(self.firsts, samples, side="right")) - 1
        return self.drawn_at[stage] + self._within(stage, samples - int(self.firsts[stage]))

    def share(self, stage: int) -> NDArray[np.float64]:
        """Of each source in a stage's tokens, as it will be, float64 [sources]."""
        tokens = self.before[stage][:, -1] * self.per_sample
        shares: NDArray[np.float64] = tokens / tokens.sum()
        return shares

    def locate(self, counters: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and index in it of the run's samples `counters` (int64 [m]); int64 [m] each."""
        sources, indices = np.empty_like(counters), np.empty_like(counters)
        stages = np.searchsorted(self.firsts, counters, side="right") - 1
        for stage in np.unique(stages):
            here = np.flatnonzero(stages == stage)
            rounds, rest = np.divmod(counters[here] - self.firsts[stage], PERIOD)
            table, before = self.tables[stage], self.before[stage]
            sources[here] = table[rest]
            indices[here] = (
                self.drawn_at[stage][table[rest]]
                + rounds * before[table[rest], -1]
                + before[table[rest], rest]
            )
        for source in np.unique(sources).tolist():
            here = np.flatnonzero(sources == source)
            size, windows = int(self.sizes[source]), self.windows[source]
            indices[here] = sample_indices(self.seed, indices[here], size, source, windows)
        return sources, indices


def interleaved(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """PERIOD source numbers, evenly mixed by share; a source with any comes at least once."""
    exact = shares / shares.sum() * PERIOD
    counts = np.maximum(np.floor(exact), shares > 0)
    while counts.sum() < PERIOD:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > PERIOD:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    # each source's occurrences at the middles of equal parts of the period, all in order
    places = [((np.arange(c) + 0.5) / c, np.full(int(c), i)) for i, c in enumerate(counts) if c]
    times, sources = (np.concatenate(parts) for parts in zip(*places, strict=True))
    table: NDArray[np.int64] = sources[np.lexsort((sources, times))].astype(np.int64)
    return table


class Blend:
    """Prepared folders read as one stream. Raises DataError where they do not go together."""

    def __init__(
        self,
        sources: Sequence[PackedDataset],
        *,
        seed: int,
        names: Sequence[str] = ("train",),
        stages: Sequence[Stage] = (Stage(0, (1.0,)),),
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        """names: of the sources; window_tokens: within which samples are shuffled."""
        self.sources, self.names, self.meta = list(sources), list(names), sources[0].meta
        for source in self.sources[1:]:
            if source.meta.tokenizer_hash == self.meta.tokenizer_hash:
                continue
            if different := source.differing_tokenizer(self.sources[0].tokenizer()):
                raise DataError(
                    f"{source.folder}: made with another tokenizer than {self.sources[0].folder} "
                    f"(they differ in {', '.join(different)}); sources of one run need one "
                    "tokenizer: prepare one of them again"
                )
        self.order = BlendOrder(
            seed,
            [len(source) for source in self.sources],
            [source.meta.tokens for source in self.sources],
            stages,
            [_windows(source.meta.seq_len, window_tokens) for source in self.sources],
        )
        self._warn_of_shares(stages)
        self._page = lru_cache(maxsize=64)(self._located_page)
        self.stages = list(stages)
        self.fingerprint = self.fingerprint_with(stages)

    def fingerprint_with(self, stages: Sequence[Stage], tokenizer_hash: str = "") -> str:
        """The identity of the stream in which these sources come by such stages.

        tokenizer_hash: of the tokenizer.json that they might as well have been prepared with
        [each source's own]: another file of the same tokenizer.
        """
        sources = [
            source.fingerprint_with(tokenizer_hash) if tokenizer_hash else source.meta.fingerprint
            for source in self.sources
        ]
        if len(sources) == 1:
            return sources[0]
        parts = [sources, [[stage.first, stage.weights] for stage in stages]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _warn_of_shares(self, stages: Sequence[Stage]) -> None:
        """Say which sources come more or less often than asked, their shares being rounded."""
        for number, stage in enumerate(stages):
            asked = np.array(stage.weights) / sum(stage.weights)
            for name, want, have in zip(self.names, asked, self.order.share(number), strict=True):
                if abs(have - want) > SHARE_TOLERANCE * want:
                    log.warning(
                        "data.sources %s: its weight asks for %.3g of the tokens from sample %d "
                        "on, but it gets %.3g; a source comes a whole number of times in %d "
                        "samples. Use a larger weight, or leave it out.",
                        *(name, want, stage.first, have, PERIOD),
                    )

    def read(self, counters: NDArray[np.int64]) -> tuple[list[Sample], NDArray[np.int64]]:
        """The run's samples of these numbers, and the source of each (int64 [m]).

        Raises BadShardError naming a damaged shard.
        """
        sources, indices = self._places(counters)
        if len(self.sources) == 1:
            return self.sources[0].read(indices), sources
        samples: list[Sample | None] = [None] * len(counters)
        for source in np.unique(sources).tolist():
            here = np.flatnonzero(sources == source)
            found = self.sources[source].read(indices[here])
            for place, sample in zip(here.tolist(), found, strict=True):
                samples[place] = sample
        return [sample for sample in samples if sample is not None], sources

    def _places(self, counters: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As order.locate; of many samples at once and kept, since one costs as much as a page."""
        first, last = int(counters[0]) // PAGE, int(counters[-1]) // PAGE
        here = counters - first * PAGE
        sources, indices = self._page(first)
        if last > first:
            pages = [self._page(number) for number in range(first, last + 1)]
            sources, indices = (np.concatenate(parts) for parts in zip(*pages, strict=True))
        return sources[here], indices[here]

    def _located_page(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.order.locate(np.arange(number * PAGE, (number + 1) * PAGE))

    def make_ready(self, counters: NDArray[np.int64]) -> None:
        """Have the shards of these samples checked and on this node. Raises BadShardError."""
        sources, indices = self._places(counters)
        for source in np.unique(sources).tolist():
            self.sources[source].make_ready(indices[sources == source])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each source by its name."""
        return dict(zip(self.names, (s.meta.fingerprint for s in self.sources), strict=True))

    def fingerprint_of(self, folder: str) -> str:
        """Of the source in a folder."""
        return next(s.meta.fingerprint for s in self.sources if s.folder == folder)

    def known_fingerprint(self, source: str) -> str | None:
        """`source` itself if it is a source's fingerprint; that of the source of this name; or
        None."""
        named = self.fingerprints
        return source if source in named.values() else named.get(source)

    def skip(self, fingerprint: str, shard: int) -> None:
        """From now on the samples of a shard are all padding, in every source of this fingerprint.
        Raises DataError if none of its shards is left."""
        for source in self.sources:
            if source.meta.fingerprint == fingerprint and shard < len(source.shards):
                source.skip(shard)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been read after so many samples of the run."""
        drawn = self.order.drawn(samples) / self.order.sizes
        return dict(zip(self.names, drawn.tolist(), strict=True))

    def tokens(self, samples: int) -> dict[str, int]:
        """Of each source in the first `samples` of the run, padding included."""
        drawn = self.order.drawn(samples) * [source.meta.seq_len for source in self.sources]
        return dict(zip(self.names, drawn.tolist(), strict=True))


def _windows(seq_len: int, window_tokens: int) -> Windows:
    block_tokens = min(BLOCK_TOKENS, -(-window_tokens // MIN_BLOCKS))
    return Windows(max(1, block_tokens // seq_len), max(1, window_tokens // block_tokens))
