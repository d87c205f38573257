"""Samples into a Batch: next-token labels and everything document boundaries imply."""

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.batch import Batch
from data_pipeline.packing import Sample


def collate(samples: Sequence[Sample], num_counted: int | None = None) -> Batch:
    """B samples of L + 1 tokens as a batch [B, L].

    Inputs are tokens 0..L-1, labels tokens 1..L. A label counts (loss_mask 1) when it lies in the
    same piece of a document as its input token and is not padding. Rows from `num_counted` on
    have no loss at all: they only fill up the shape.
    """
    # int64 at once: torch.uint16 can neither index nor add.
    tokens = np.stack([sample.tokens.astype(np.int64) for sample in samples])  # [B, L + 1]
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    loss_mask = np.ones((rows, length), np.float32)
    position_ids = np.empty((rows, length), np.int64)
    borders = []
    for row, sample in enumerate(samples):
        ends = np.cumsum(sample.doc_lens, dtype=np.int64)
        starts = ends - sample.doc_lens
        position_ids[row] = (np.arange(length + 1) - np.repeat(starts, sample.doc_lens))[:-1]
        loss_mask[row, ends[:-1] - 1] = 0  # the label of a piece's last token is another's first
        if sample.num_pad:
            loss_mask[row, starts[-1] :] = 0
        # A piece that starts at token L is a label only: it would be a segment of no length.
        borders.append(row * length + starts[starts < length])
    borders.append(np.array([rows * length]))
    if num_counted is not None:
        loss_mask[num_counted:] = 0
    return Batch(
        tokens=torch.from_numpy(tokens[:, :-1].copy()),
        labels=torch.from_numpy(tokens[:, 1:].copy()),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(np.concatenate(borders).astype(np.int32)),
    )
