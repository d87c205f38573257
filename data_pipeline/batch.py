"""The one batch type: what the loader yields and everything downstream consumes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B packed sequences of L tokens.

    tokens:       int64 [B, L]
    labels:       int64 [B, L], the next token
    loss_mask:    float32 [B, L], 0 where the label belongs to another document or to padding
    position_ids: int32 [B, L], restart at 0 with every document
    cu_seqlens:   int32 [num_segments + 1], segment borders over the flattened B·L tokens, from 0 to
                  B·L; every row start is a border
    sources:      int64 [B], which of the blend's sources a row is of
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    sources: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(t.to(device) for t in vars(self).values()))

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return Batch(*(t.pin_memory() for t in vars(self).values()))
