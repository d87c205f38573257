"""One global step over the micro-batches: Megatron-core's schedule, losses summed per token."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from parallel.compat import cuda_calls_on_cpu
from parallel.zero import ZeroOptimizer


class MicroBatch(Protocol):
    """The fields of a batch that the model reads (shapes as in DESIGN: [B, L], cu_seqlens flat)."""

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


def count_tokens(batches: Sequence[MicroBatch], device: torch.device) -> Tensor:
    """Tokens with a loss in the global batch: float64 scalar, the same on every rank."""
    count = torch.stack([b.loss_mask.sum(dtype=torch.float64) for b in batches]).sum().to(device)
    dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
    return count


def forward_backward(zero: ZeroOptimizer, batches: Sequence[MicroBatch], tokens: Tensor) -> Tensor:
    """Accumulate the gradients of the mean loss per token over the global batch.

    batches: this rank's micro-batches; tokens: count_tokens of them. Returns the mean loss in nats,
    float64 scalar, the same on every rank. Gradients are reduced when this returns.
    """
    # ZeRO averages over data-parallel ranks; the loss is to be a mean over all tokens
    scale = parallel_state.get_data_parallel_world_size() / tokens
    zero.stage.config.no_sync_func = zero.no_sync
    losses = _run(zero.scheduled_module, batches, scale.float(), forward_only=False)
    zero.reduce_gradients()
    return _sum_everywhere(losses, tokens.device) / tokens


@torch.no_grad()
def evaluate_loss(zero: ZeroOptimizer, batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
    """Σ loss and Σ tokens over all data-parallel ranks' micro-batches (as many on every rank)."""
    tokens = count_tokens(batches, batches[0].tokens.device)
    zero.stage.config.no_sync_func = None
    losses = _run(zero.scheduled_module, batches, torch.ones_like(tokens).float(), True)
    return _sum_everywhere(losses, tokens.device), tokens


def _run(
    module: Any, batches: Sequence[MicroBatch], scale: Tensor, forward_only: bool
) -> list[Tensor]:
    """Summed loss of every micro-batch, on the last stage; an empty list elsewhere."""

    def scaled(batch: MicroBatch, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return loss * scale, batch.loss_mask.sum().int(), loss.detach()

    def forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = model(
            batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens
        )
        return output, partial(scaled, batch)

    run = get_forward_backward_func()
    with nullcontext() if torch.cuda.is_available() else cuda_calls_on_cpu():
        return run(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=module,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.numel(),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _sum_everywhere(losses: list[Tensor], device: torch.device) -> Tensor:
    """Sum over micro-batches and data-parallel ranks, from the last stage to every stage."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    if losses:
        total = torch.stack(losses).sum(dtype=torch.float64)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total
