"""One global step over the micro-batches: Megatron-core's schedule, losses summed per token."""

import time
from collections.abc import Callable, Iterator, Sequence
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
from parallel.sums import Key, sums_by
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

    def on_host(self, scalar: Tensor) -> tuple[list[float], list[float], float]:
        """Losses, tokens, and another value of the step; waits for the device, once."""
        both = torch.cat((self.loss, self.tokens, scalar.double().reshape(1))).tolist()
        count = len(self.loss)
        return both[:count], both[count:-1], both[-1]


def mean_loss(losses: Sequence[float], tokens: Sequence[float]) -> float | None:
    """Per token of all sources; None where no token has a loss."""
    return sum(losses) / sum(tokens) if sum(tokens) else None


def count_tokens(batches: Sequence[LocalBatch], device: torch.device) -> Tensor:
    """Tokens with a loss in the global batch: float64 scalar, the same on every rank."""
    count = torch.stack([b.loss_mask.sum(dtype=torch.float64) for b in batches]).sum().to(device)
    dist.all_reduce(count, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return count.clamp(min=1)  # a batch of padding alone has no loss, and no gradient


def forward_backward(
    zero: ZeroOptimizer,
    batches: Sequence[LocalBatch],
    tokens: Tensor,
    num_sources: int = 1,
    run: Callable[[Sequence[LocalBatch], Tensor], list[Tensor]] | None = None,
) -> LossSums:
    """Accumulate the gradients of the mean loss per token over the global batch.

    batches: this rank's micro-batches, of `num_sources` sources; tokens: count_tokens of them.
    run: runs them in place of Megatron-core's schedule, given the scale of their losses, and
    returns `row_sums` of each. Gradients are reduced when this returns.
    """
    # ZeRO averages over data- and context-parallel ranks; the loss is to be a mean over all tokens
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    scale = replicas / tokens
    zero.set_no_sync(True)
    losses = (
        run_schedule(zero.scheduled_modules, batches, scale.float(), row_sums)
        if run is None
        else run(batches, scale.float())
    )
    computed = Mark(tokens.device)
    zero.reduce_gradients()
    return _sum_everywhere(losses, num_sources, tokens.device, computed)


@torch.no_grad()
def evaluate(
    modules: list[Any], batches: Sequence[LocalBatch], key: Key, size: int, weights: Tensor
) -> Tensor:
    """Sums over the counted tokens of all ranks' micro-batches, as many on each, by a key.

    The rows of `parallel.sums`, float64 [4, size], the same on every rank.
    """
    device = batches[0].tokens.device
    if len(modules) > 1:  # interleaved stages take micro-batches by as many as there are stages
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        blank = replace(batches[0], loss_mask=torch.zeros_like(batches[0].loss_mask))
        batches = [*batches, *[blank] * (-len(batches) % stages)]

    def by_key(batch: LocalBatch, by_token: Tensor, missed: Tensor) -> Tensor:
        return sums_by(batch, key, size, weights, by_token, missed)

    tables = run_schedule(modules, batches, None, by_key)
    sums = torch.zeros(4, size, dtype=torch.float64, device=device)
    return _over_ranks(torch.stack(tables).sum(0) if tables else sums)


def row_sums(batch: LocalBatch, by_token: Tensor) -> Tensor:
    """Source, summed loss and tokens of a batch's rows, float64 [3, B]."""
    by_row = by_token.view_as(batch.loss_mask).sum(1, dtype=torch.float64)
    return torch.stack(
        (batch.sources.double(), by_row, batch.loss_mask.sum(1, dtype=torch.float64))
    )


def run_schedule(
    modules: list[Any],
    batches: Sequence[LocalBatch],
    scale: Tensor | None,
    summary: Callable[..., Tensor],
) -> list[Tensor]:
    """The summary of every micro-batch (of the batch and what the last stage says of its tokens),
    on the last stage; an empty list elsewhere. scale: of the loss, before its gradients are taken;
    None goes forward only."""

    def scaled(batch: LocalBatch, output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        loss, *by_token = output
        tokens = batch.loss_mask.sum().int()
        return loss if scale is None else loss * scale, tokens, summary(batch, *by_token)

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
            forward_only=scale is None,
        )


def _sum_everywhere(
    losses: list[Tensor], num_sources: int, device: torch.device, computed: Mark
) -> LossSums:
    """Over micro-batches, data- and context-parallel ranks; from the last stage to all."""
    sums = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
    if losses:
        sources, *rows = torch.cat(losses, dim=1)
        sums = torch.stack(rows) @ F.one_hot(sources.long(), num_sources).double()
    loss, tokens = _over_ranks(sums)
    return LossSums(loss, tokens, computed)


def _over_ranks(sums: Tensor) -> Tensor:
    """Of the last stage's ranks, on all ranks."""
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    if (tensor := parallel_state.get_tensor_model_parallel_world_size()) > 1:
        # the same already, unless one of them is broken: and then all of them are to know
        dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
        sums /= tensor
    return sums
