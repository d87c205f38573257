"""One global step over the micro-batches: Megatron-core's schedule, losses summed per token."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from parallel.compat import cuda_calls_on_cpu
from parallel.context import LocalBatch
from parallel.zero import ZeroOptimizer


class Mark:
    """A moment in what the device does; nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._host = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: "Mark") -> float:
        """Both must be past."""
        if self._event is None or earlier._event is None:
            return self._host - earlier._host
        return earlier._event.elapsed_time(self._event) / 1000


@dataclass(frozen=True)
class LossSums:
    """Over a global batch, by source of the rows; float64 [sources], the same on every rank."""

    loss: Tensor
    """Nats."""
    tokens: Tensor
    """Those with a loss."""
    computed: Mark
    """When this rank had done its own part."""

    @property
    def mean(self) -> Tensor:
        """Per token of all sources, float64 scalar."""
        return self.loss.sum() / self.tokens.sum().clamp(min=1)


def count_tokens(batches: Sequence[LocalBatch], device: torch.device) -> Tensor:
    """Tokens with a loss in the global batch: float64 scalar, the same on every rank."""
    count = torch.stack([b.loss_mask.sum(dtype=torch.float64) for b in batches]).sum().to(device)
    dist.all_reduce(count, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return count.clamp(min=1)  # a batch of padding alone has no loss, and no gradient


def forward_backward(
    zero: ZeroOptimizer, batches: Sequence[LocalBatch], tokens: Tensor, num_sources: int = 1
) -> LossSums:
    """Accumulate the gradients of the mean loss per token over the global batch.

    batches: this rank's micro-batches, of `num_sources` sources; tokens: count_tokens of them.
    Gradients are reduced when this returns.
    """
    # ZeRO averages over data- and context-parallel ranks; the loss is to be a mean over all tokens
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    scale = replicas / tokens
    zero.set_no_sync(True)
    losses = _run(zero.scheduled_modules, batches, scale.float(), forward_only=False)
    computed = Mark(tokens.device)
    zero.reduce_gradients()
    return _sum_everywhere(losses, num_sources, tokens.device, computed)


@torch.no_grad()
def evaluate_loss(zero: ZeroOptimizer, batches: Sequence[LocalBatch]) -> LossSums:
    """Over data- and context-parallel ranks' micro-batches, as many on each."""
    device = batches[0].tokens.device
    zero.set_no_sync(False)
    modules = zero.scheduled_modules
    if len(modules) > 1:  # interleaved stages take micro-batches by as many as there are stages
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        blank = replace(batches[0], loss_mask=torch.zeros_like(batches[0].loss_mask))
        batches = [*batches, *[blank] * (-len(batches) % stages)]
    losses = _run(modules, batches, torch.ones((), device=device), True)
    return _sum_everywhere(losses, 1, device, Mark(device))


def _run(
    modules: list[Any], batches: Sequence[LocalBatch], scale: Tensor, forward_only: bool
) -> list[Tensor]:
    """Of every micro-batch, on the last stage: source, summed loss and tokens of its rows, float64
    [3, B]. An empty list elsewhere."""

    def scaled(batch: LocalBatch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        loss, by_token = output
        by_row = by_token.view_as(batch.loss_mask).sum(1, dtype=torch.float64)
        tokens = batch.loss_mask.sum(1, dtype=torch.float64)
        rows = torch.stack((batch.sources.double(), by_row, tokens))
        return loss * scale, tokens.sum().int(), rows

    def forward_step(iterator: Iterator[LocalBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = model(
            batch.tokens,
            batch.labels,
            batch.loss_mask,
            batch.position_ids,
            batch.cu_seqlens,
            batch.local_cu_seqlens,
        )
        return output, partial(scaled, batch)

    run = get_forward_backward_func()
    interleaved = len(modules) > 1
    context = parallel_state.get_context_parallel_world_size()
    with nullcontext() if torch.cuda.is_available() else cuda_calls_on_cpu():
        return run(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in modules] if interleaved else iter(batches),
            model=modules if interleaved else modules[0],
            num_microbatches=len(batches),
            # of whole rows: the schedule itself divides by the context-parallel size
            seq_length=batches[0].tokens.numel() * context,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _sum_everywhere(
    losses: list[Tensor], num_sources: int, device: torch.device, computed: Mark
) -> LossSums:
    """Over micro-batches, data- and context-parallel ranks; from the last stage to all."""
    sums = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
    if losses:
        sources, *rows = torch.cat(losses, dim=1)
        sums = torch.stack(rows) @ F.one_hot(sources.long(), num_sources).double()
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    if (tensor := parallel_state.get_tensor_model_parallel_world_size()) > 1:
        # the same already, unless one of them is broken: and then all of them are to know
        dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
        sums /= tensor
    return LossSums(sums[0], sums[1], computed)
