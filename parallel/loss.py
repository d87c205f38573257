"""Cross entropy over a vocabulary split across the tensor-parallel group, summed over tokens."""

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def summed_loss(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Σ over unmasked tokens of -log softmax(logits)[label], float32 scalar.

    logits [T, 1, vocab / tp]; labels int64 [B, L]; loss_mask float32 [B, L], B·L = T.
    """
    losses = vocab_parallel_cross_entropy(logits.float(), labels.reshape(-1, 1))  # [T, 1]
    return torch.dot(losses.view(-1), loss_mask.reshape(-1))
