"""Samples into a Batch: next-token labels and everything document boundaries imply."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.batch import Batch
from data_pipeline.packing import Sample


def collate(
    samples: Sequence[Sample],
    num_counted: int | None = None,
    sources: NDArray[np.int64] | None = None,
) -> Batch:
    """B samples of L + 1 tokens as a batch [B, L]; its tensors may share memory.

    Inputs are tokens 0..L-1, labels tokens 1..L. A label counts (loss_mask 1) when it lies in the
    same piece of a document as its input token and is not padding. Rows from `num_counted` on
    have no loss at all: they only fill up the shape. sources: int64 [B], 0 where not given.
    """
    rows, size = len(samples), samples[0].tokens.size
    # torch.uint16 can neither index nor add
    tokens = np.concatenate([sample.tokens for sample in samples]).astype(np.int64)
    tokens = tokens.reshape(rows, size)
    lens = np.concatenate([sample.doc_lens for sample in samples])
    starts = lens.cumsum(dtype=np.int32) - lens  # of pieces, over all rows' L + 1 tokens
    counting, ones = _counting(rows * size)
    if lens.size < rows * size // 256:
        position_ids = np.concatenate([counting[:length] for length in lens.tolist()])
    else:  # as above, but faster for short pieces
        position_ids = starts.repeat(lens)
        np.subtract(counting, position_ids, out=position_ids)
    # By token, not label: a piece's first is what the last token of the one before would predict
    counts = ones.reshape(rows, size).copy()
    counts.reshape(-1)[starts] = 0
    for row, sample in enumerate(samples):
        if sample.num_pad:
            counts[row, size - sample.num_pad :] = 0
    counts[num_counted if num_counted is not None else rows :] = 0
    row_of, column = np.divmod(starts, size)
    # A piece that starts at token L is a label only: it would be a segment of no length.
    begins = (starts - row_of)[column < size - 1]
    borders = np.empty(begins.size + 1, np.int32)
    borders[:-1], borders[-1] = begins, rows * (size - 1)
    if sources is None:
        sources = np.zeros(rows, np.int64)
    return Batch(  # cut by numpy, which takes a tenth of torch's time for it
        tokens=torch.from_numpy(tokens[:, :-1]),
        labels=torch.from_numpy(tokens[:, 1:]),
        loss_mask=torch.from_numpy(counts[:, 1:]),
        position_ids=torch.from_numpy(position_ids.reshape(rows, size)[:, :-1]),
        cu_seqlens=torch.from_numpy(borders),
        sources=torch.from_numpy(sources),
    )


@lru_cache(maxsize=4)
def _counting(size: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    return np.arange(size, dtype=np.int32), np.ones(size, np.float32)
