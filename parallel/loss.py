"""The output head and cross entropy, a block of tokens at a time.

    loss = Σ_t mask_t · -log softmax(W h_t)[label_t]

The logits of all tokens together would be the largest tensor of the step (tokens × vocabulary), so
each block's logits live only while its loss and gradients are computed, both in forward, where the
gradient takes their place; backward scales the gradients. The vocabulary is split over the
tensor-parallel group.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from kernels.cross_entropy.cross_entropy import cross_entropy_
from parallel.main_grads import main_grad, mark
from parallel.products import add_product
from parallel.sizes import head_block_tokens


def head_loss(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    valid: int,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss of hidden states h [T, hidden] under a head weight [V, hidden]: its sum, a float32
    scalar, and that of every token, float32 [T], which has no gradient.

    labels int64 [T] in the whole vocabulary; loss_mask float32 [T]; valid: rows of this rank's
    weight that are tokens, the rest being padding of the vocabulary. The sum has the gradient of
    Σ_t mask_t (loss_t + z_loss · (log Σ_j exp(W h_t)_j)²), and the value without that term.
    """
    given = (h, weight, labels, loss_mask, valid, z_loss)
    total, by_token, *_ = (
        head_loss_operator(*given) if is_dynamo_compiling() else _HeadLoss.apply(*given)
    )
    return total, by_token


@torch.no_grad()
def head_scores(
    h: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_loss`, and for every token, float32 [T], whether another than the label is likelier."""
    by_token, missed = torch.empty_like(loss_mask), torch.empty_like(loss_mask)
    for part, logits in _blocks(h, weight):
        _cross_entropy(logits, labels[part], loss_mask[part], valid, (by_token[part], missed[part]),
                       gradient=False)  # fmt: skip
    return by_token.sum(), by_token, missed


def head_logits(h: Tensor, weight: Tensor, valid: int) -> Tensor:
    """W h [T, V], with -inf in the columns of vocabulary padding."""
    logits = F.linear(h, weight)
    # not for autograd to see: a column of -inf has no gradient, and the mask's would be a copy
    logits.detach()[:, max(0, valid) :] = float("-inf")
    return logits


def _blocks(h: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of tokens, and their logits [t, V] with numbers in the padding, in one buffer."""
    rows = weight.shape[0]
    block = min(h.shape[0], head_block_tokens(rows, on_gpu=not h.is_cpu))
    logits = h.new_empty(block, rows)
    for at in range(0, h.shape[0], block):
        part = slice(at, min(at + block, h.shape[0]))
        yield part, torch.mm(h[part], weight.t(), out=logits[: part.stop - at])


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    valid: int,
    out: tuple[Tensor, Tensor],
    *,
    z_loss: float = 0.0,
    gradient: bool = True,
) -> None:
    """Of this rank's columns, within the tensor-parallel group."""
    group = parallel_state.get_tensor_model_parallel_group()
    cross_entropy_(
        logits, labels, loss_mask, valid=valid, out=out, z_loss=z_loss, gradient=gradient,
        group=group,
    )  # fmt: skip


def _loss_and_gradients(
    h: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, valid: int, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every token, and the gradients of their sum: of h, and of the weight (float32)."""
    by_token, missed = torch.empty_like(loss_mask), torch.empty_like(loss_mask)
    grad_h, grad_weight = torch.empty_like(h), None
    for part, logits in _blocks(h, weight):
        out = by_token[part], missed[part]
        _cross_entropy(logits, labels[part], loss_mask[part], valid, out, z_loss=z_loss)
        torch.mm(logits, weight, out=grad_h[part])
        grad_weight = add_product(grad_weight, logits.t(), h[part])
    assert grad_weight is not None, "no tokens"
    return by_token, grad_h, grad_weight


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        valid: int,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        by_token, grad_h, grad_weight = _loss_and_gradients(
            h, weight, labels, loss_mask, valid, z_loss
        )
        ctx.parameter = weight if main_grad(weight) is not None else None
        if ctx.parameter is None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_h, grad_weight)
        ctx.mark_non_differentiable(by_token)
        ctx.set_materialize_grads(False)  # which would be zeros for by_token
        return by_token.sum(), by_token

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight = ctx.saved_tensors
        scale = grads[0]
        # in place: nobody else has them, and autograd refuses to come here twice
        grad_h.mul_(scale)
        if ctx.parameter is None:
            return grad_h, grad_weight.mul_(scale), None, None, None, None
        total = main_grad(ctx.parameter)
        assert total is not None
        total.addcmul_(grad_weight, scale)  # float32, not rounded before
        mark(ctx.parameter)
        return grad_h, None, None, None, None, None


# -- the same as an operator that torch.compile takes as it is -------------------------------------


@torch.library.custom_op("transxssm::head_loss", mutates_args=())
def head_loss_operator(
    h: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, valid: int, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum, every token's loss, and the gradients of the sum: of h and the weight."""
    by_token, grad_h, grad_weight = _loss_and_gradients(h, weight, labels, loss_mask, valid, z_loss)
    return by_token.sum(), by_token, grad_h, grad_weight.to(weight.dtype)


@head_loss_operator.register_fake
def _(h: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, *rest: Any) -> tuple[Any, ...]:
    by_token = torch.empty_like(loss_mask)
    return by_token.new_empty(()), by_token, torch.empty_like(h), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_total: Tensor, *rest: None) -> tuple[Any, ...]:
    grad_h, grad_weight = ctx.saved_tensors
    return grad_h * d_total, grad_weight * d_total, None, None, None, None


head_loss_operator.register_autograd(_differentiate, setup_context=_save)
