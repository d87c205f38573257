"""How well tokens are predicted, summed by what a key says of them. Imports no Megatron-core.

Rows of a table float64 [4, size]: the loss in nats, tokens that count, those of them of which
another token was likelier, and a weight of the labels (their bytes of text).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class PackedBatch(Protocol):
    """What a loader gives (shapes as in DESIGN: [B, L], cu_seqlens flat), whole rows."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...
    @property
    def sources(self) -> Tensor: ...


Key = Callable[[PackedBatch], Tensor]
"""int64 [B, L] in [0, size)."""


def by_position(batch: PackedBatch) -> Tensor:
    """A token's position in its document."""
    return batch.position_ids.long()


def by_row(batch: PackedBatch) -> Tensor:
    """What the row's source says."""
    return batch.sources[:, None].expand_as(batch.tokens)


def sums_by(
    batch: PackedBatch, key: Key, size: int, weights: Tensor, by_token: Tensor, missed: Tensor
) -> Tensor:
    """The table of a batch. weights: [vocab]; by_token, missed: [B · L], of the labels."""
    mask = batch.loss_mask.reshape(-1).double()
    weight = weights[batch.labels.reshape(-1)]
    keys = key(batch).reshape(-1)
    rows = torch.stack([row * mask for row in (by_token, mask, missed, weight)])
    # unlike bincount, it has a deterministic way on GPUs
    return torch.zeros(4, size, dtype=torch.float64, device=keys.device).index_add_(1, keys, rows)
