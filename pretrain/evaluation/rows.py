"""Scoring rows of tokens, of which some count."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.dataset import PackedDataset
from data_pipeline.loader import sequential_batches
from parallel.sums import by_position, by_row
from pretrain.evaluation.models import TOKENS_AT_ONCE, Model
from pretrain.evaluation.scores import Scores

Ids = NDArray[np.int32]
"""Token ids of a text: 4 bytes each, of which a Python list takes up to 36."""


@dataclass(frozen=True)
class Row:
    """Token ids, at most Model.max_length + 1 of them, and the indices, from 1 on, of those that
    count."""

    ids: Sequence[int] | Ids
    counts: range

    @property
    def length(self) -> int:
        """Tokens that go into the model."""
        return len(self.ids) - 1


def score_rows(model: Model, rows: Sequence[Row]) -> list[Scores]:
    """Of each row. A collective."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
    scores: dict[int, Scores] = {}
    at = 0
    while at < len(order):
        length = _rounded(rows[order[at]].length, model.length_multiple)
        here = max(1, TOKENS_AT_ONCE // length)
        together = order[at : at + here * model.data_ranks]
        at += len(together)
        # as many rows on every rank; what is left over is of no row
        here = math.ceil(len(together) / model.data_ranks)
        mine = together[model.data_rank * here : (model.data_rank + 1) * here]
        places = {index: place for place, index in enumerate(together)}
        batch = _batch([(places[i], rows[i]) for i in mine], here, length, model.end_of_text)
        table = model.sums([batch], by_row, len(together))
        scores |= {index: Scores.of(table[:, place]) for index, place in places.items()}
    return [scores[i] for i in range(len(rows))]


def _rounded(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def _batch(rows: list[tuple[int, Row]], size: int, length: int, filler: int) -> Batch:
    """Rows and what they are called, filled up on the right, where causal layers do not look."""
    tokens = torch.full((size, length + 1), filler)
    loss_mask = torch.zeros(size, length)
    sources = torch.zeros(size, dtype=torch.int64)
    for row, (name, given) in enumerate(rows):
        counts = given.counts
        tokens[row, : len(given.ids)] = torch.tensor(np.asarray(given.ids))
        loss_mask[row, counts.start - 1 : counts.stop - 1 : counts.step] = 1
        sources[row] = name
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=loss_mask,
        position_ids=torch.arange(length, dtype=torch.int32).repeat(size, 1),
        cu_seqlens=torch.arange(size + 1, dtype=torch.int32) * length,
        sources=sources,
    )


def text_rows(ids: Sequence[int] | Ids, end_of_text: int, max_length: int) -> Iterator[Row]:
    """Rows that count all tokens of a text, each once, the first after an end of text.

    Windows of max_length tokens one after the other, the last one reaching back as far as it can:
    the rolling windows of EleutherAI's lm-evaluation-harness (context_len 1).
    """
    whole = np.concatenate((np.array([end_of_text], np.int32), np.asarray(ids, np.int32)))
    borders = [*range(1, len(whole), max_length), len(whole)]
    for begin, end in pairwise(borders):
        first = max(0, end - 1 - max_length)
        yield Row(whole[first:end], range(begin - first, end - first))


def score_dataset(model: Model, dataset: PackedDataset, limit: int | None = None) -> Tensor:
    """The table by position, float64 [4, seq_len], over the first `limit` sequences [all]. A
    collective."""
    size = max(1, TOKENS_AT_ONCE // dataset.meta.seq_len)
    table = torch.zeros(4, dataset.meta.seq_len, dtype=torch.float64)
    for batch in sequential_batches(
        dataset,
        size,
        limit,
        data_parallel_rank=model.data_rank,
        data_parallel_size=model.data_ranks,
    ):
        table += model.sums([batch], by_position, dataset.meta.seq_len)
    return table
