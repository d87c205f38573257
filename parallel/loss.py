"""The output head and cross entropy, a block of tokens at a time.

    loss = Σ_t mask_t · -log softmax(W h_t)[label_t]

The logits of all tokens together would be the largest tensor of the step (tokens × vocabulary), so
each block's logits live only while its loss and gradients are computed, both in forward; backward
scales the gradients. The vocabulary is split over the tensor-parallel group.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from parallel.sizes import head_block_tokens


def head_loss(
    h: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, valid: int
) -> tuple[Tensor, Tensor]:
    """Loss of hidden states h [T, hidden] under a head weight [V, hidden]: its sum, a float32
    scalar, and that of every token, float32 [T], which has no gradient.

    labels int64 [T] in the whole vocabulary; loss_mask float32 [T]; valid: rows of this rank's
    weight that are tokens, the rest being padding of the vocabulary.
    """
    total, by_token = _HeadLoss.apply(h, weight, labels, loss_mask, valid)
    return total, by_token


@torch.no_grad()
def head_scores(
    h: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_loss`, and for every token, float32 [T], whether another than the label is likelier."""
    block = head_block_tokens(weight.shape[0], h.device.type != "cpu")
    by_token, missed = torch.empty_like(loss_mask), torch.empty_like(loss_mask)
    group = parallel_state.get_tensor_model_parallel_group()
    first = group.rank() * weight.shape[0]
    for at in range(0, h.shape[0], block):
        part = slice(at, at + block)
        logits = head_logits(h[part], weight, valid).float()  # [t, V]
        best = logits.amax(1)
        row = labels[part] - first
        here = (row >= 0) & (row < weight.shape[0])
        of_label = logits.gather(1, row.clamp(0, weight.shape[0] - 1)[:, None])[:, 0]
        of_label = torch.where(here, of_label, float("-inf"))
        if group.size() > 1:
            for part_of_ranks in (best, of_label):
                dist.all_reduce(part_of_ranks, op=dist.ReduceOp.MAX, group=group)
        missed[part] = (of_label < best).float() * loss_mask[part]
        # in the same order of operations as head_loss; it changes the logits
        by_token[part] = _cross_entropy(logits, labels[part]) * loss_mask[part]
    return by_token.sum(), by_token, missed


def head_logits(h: Tensor, weight: Tensor, valid: int) -> Tensor:
    """W h [T, V], with -inf in the columns of vocabulary padding."""
    logits = F.linear(h, weight)
    # not for autograd to see: a column of -inf has no gradient, and the mask's would be a copy
    logits.detach()[:, max(0, valid) :] = float("-inf")
    return logits


def _block_loss(h: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, valid: int) -> Tensor:
    """Of every token [t]."""
    return _cross_entropy(head_logits(h, weight, valid).float(), labels) * loss_mask


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [t, V / tp]: [t]. May change the logits."""
    return vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1)).view(-1)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, valid: int
    ) -> tuple[Tensor, Tensor]:
        block = head_block_tokens(weight.shape[0], h.device.type != "cpu")
        by_token = torch.empty_like(loss_mask)
        grad_h = torch.empty_like(h)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for at in range(0, h.shape[0], block):
            part = slice(at, at + block)
            with torch.enable_grad():
                h_part = h[part].detach().requires_grad_()
                weight_part = weight.detach().requires_grad_()
                loss = _block_loss(h_part, weight_part, labels[part], loss_mask[part], valid)
                grad_h[part], part_grad_weight = torch.autograd.grad(
                    loss.sum(), (h_part, weight_part)
                )
            grad_weight += part_grad_weight
            by_token[part] = loss.detach()
        ctx.save_for_backward(grad_h, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(by_token)
        return by_token.sum(), by_token

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return grad_h * scale.to(grad_h.dtype), grad_weight * scale, None, None, None
