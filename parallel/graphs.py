"""A micro-batch as one launch: forward, loss and backward, captured once for each shape.

The host needs longer to issue many of a micro-batch's operations than a GPU needs to run them. A
CUDA graph issues them all at once. Its inputs are copied into static buffers; gradients accumulate
in the optimizer's buffers, as in eager execution. A graph is captured for each shape of the tokens
and each number of segments. That number is rounded up to a power of two, by repeating the last
boundary, so that few graphs are needed.

On a CPU a recording stands in for the graph (`parallel.replay`), so that tests and campaigns take
the same path through this file.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.dispatch import strict
from kernels.recording import recording
from parallel.config import ParallelConfig
from parallel.context import LocalBatch
from parallel.main_grads import main_grad
from parallel.replay import Replay
from parallel.schedule import row_sums, run_schedule
from parallel.zero import ZeroOptimizer

WARM_UP = 2  # micro-batches of a shape that run eagerly before its graph is captured
MAX_GRAPHS = 12  # micro-batches of further shapes run eagerly

log = logging.getLogger("transxssm")


class Graph(Protocol):
    """A call that is recorded once and then repeated without Python."""

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """Record a call and return its result, whose value is undefined before a replay."""

    def replay(self) -> None:
        """Repeat the call."""


class CudaGraph:
    """A torch.cuda.CUDAGraph whose memory is shared with the other graphs of its `pool`."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """Capture a call, without computing it."""
        # thread_local: a thread that writes a checkpoint may copy from the device meanwhile
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """Launch the graph."""
        self._graph.replay()


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    inputs: LocalBatch
    sums: Tensor
    """`row_sums` of the last micro-batch."""
    marked: list[Any]
    """Parameters whose `main_grad` the graph adds to."""


def why_eager(parallel: ParallelConfig) -> str | None:
    """Return why micro-batches of a layout cannot be captured, or None if they can."""
    if parallel.pipeline > 1:
        return f"parallel.pipeline={parallel.pipeline}: stages wait for each other within a step"
    if parallel.context > 1:
        return f"parallel.context={parallel.context}: its exchanges of tokens are not captured yet"
    if parallel.reduces_in_backward:
        offloaded = ", with an offloaded optimizer" if parallel.offload == "optimizer" else ""
        return (
            f"parallel.zero_stage={parallel.zero_stage}{offloaded}: DeepSpeed reduces gradients "
            "while they are computed"
        )
    return None


def graph_maker(device: torch.device) -> Callable[[], Graph]:
    """Return a function that makes an empty graph for a device."""
    if device.type == "cuda":
        return partial(CudaGraph, torch.cuda.graph_pool_handle())
    return Replay


class MicroBatchGraphs:
    """Runs a stage's micro-batches for `parallel.schedule.forward_backward`.

    The first WARM_UP micro-batches of a shape run eagerly. After a failed capture all do.
    """

    def __init__(self, zero: ZeroOptimizer, make: Callable[[], Graph]) -> None:
        """zero: of a layout for which `why_eager` is None."""
        self._zero, self._make = zero, make
        self._parameters = [p for _, p in zero.built.named_parameters()]
        self._scale = torch.zeros((), device=self._parameters[0].device)
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._addresses: list[int] = []
        self._failed = False
        # outside of BF16_Optimizer, DeepSpeed drops the gradients after each step
        self._gradients = (
            [torch.zeros_like(p) for p in self._parameters] if zero.main_grads is None else []
        )

    def run(self, batches: Sequence[LocalBatch], scale: Tensor) -> list[Tensor]:
        """Accumulate the gradients of a step's micro-batches; return `row_sums` of each.

        scale: factor of the loss, float32 scalar. In strict mode, raises what a capture raises.
        """
        self._drop_stale_graphs()
        self._scale.copy_(scale)
        self._reset_gradients()
        return [self._run(with_padded_boundaries(batch)) for batch in batches]

    def _run(self, batch: LocalBatch) -> Tensor:
        key = (*batch.tokens.shape, len(batch.cu_seqlens), len(batch.local_cu_seqlens))
        captured = self._captured.get(key) or self._captured_now(key, batch)
        if captured is None:
            return self._eager(batch)
        for buffer, given in zip(_tensors(captured.inputs), _tensors(batch), strict=True):
            buffer.copy_(given)
        captured.graph.replay()
        if self._zero.main_grads is not None:
            for parameter in captured.marked:  # Python flags, which a replay does not set
                self._zero.main_grads.mark(parameter)
        return captured.sums.clone()

    def _eager(self, batch: LocalBatch) -> Tensor:
        (sums,) = run_schedule(self._zero.scheduled_modules, [batch], self._scale, row_sums)
        return sums

    def _captured_now(self, key: tuple[int, ...], batch: LocalBatch) -> _Captured | None:
        """Capture a shape after its warm-up. Returns None where it is to run eagerly."""
        self._seen[key] += 1
        if self._failed or self._seen[key] <= WARM_UP or len(self._captured) >= MAX_GRAPHS:
            return None
        inputs = LocalBatch(*(tensor.clone() for tensor in _tensors(batch)))
        graph, last_operation = self._make(), _LastOperation()
        marked: list[Any] = []
        main_grads = self._zero.main_grads

        def call() -> Tensor:
            with last_operation:
                return self._eager(inputs)

        try:
            with recording(), main_grads.noting(marked) if main_grads else nullcontext():
                sums = graph.record(call)
        except Exception as error:
            if strict():
                raise
            self._failed = True
            log.warning(
                "a micro-batch cannot be captured as a graph (%s: %s; the last operation was %s), "
                'so that training continues eagerly; set training.cuda_graphs = "off" to avoid '
                "this warning",
                *(type(error).__name__, str(error).partition("\n")[0], last_operation.name),
            )
            return None
        log.info("captured a graph for micro-batches of %d × %d tokens, %d segments",
                 *batch.tokens.shape, len(batch.cu_seqlens) - 1)  # fmt: skip
        captured = self._captured[key] = _Captured(graph, inputs, sums, marked)
        return captured

    def _reset_gradients(self) -> None:
        """Let the parameters accumulate into the static buffers, from zero."""
        if not self._gradients:
            return
        torch._foreach_zero_(self._gradients)
        for parameter, buffer in zip(self._parameters, self._gradients, strict=True):
            assert parameter.grad is None or parameter.grad is buffer  # else it would be lost
            parameter.grad = buffer

    def _drop_stale_graphs(self) -> None:
        """Drop the graphs if weights or their `main_grad` have other addresses than before."""
        sums = [total for p in self._parameters if (total := main_grad(p)) is not None]
        addresses = [tensor.data_ptr() for tensor in (*self._parameters, *sums)]
        if self._captured and addresses != self._addresses:
            log.info("weights have moved in memory: their graphs are captured again")
            self._captured.clear()
        self._addresses = addresses


def with_padded_boundaries(batch: LocalBatch) -> LocalBatch:
    """Return the batch with a power of two of segments, of which the last ones may be empty.

    Rows that are single documents are kept, because attention has a single call for them.
    """
    rows, tokens = len(batch.tokens), batch.tokens.numel()
    return replace(
        batch,
        cu_seqlens=padded_boundaries(batch.cu_seqlens, rows, tokens),
        local_cu_seqlens=padded_boundaries(batch.local_cu_seqlens, rows, tokens),
    )


def padded_boundaries(cu_seqlens: Tensor, rows: int, tokens: int) -> Tensor:
    """Repeat the last boundary, `tokens`, until the number of segments is a power of two."""
    segments = len(cu_seqlens) - 1
    wanted = segments if segments == rows else 1 << (segments - 1).bit_length()
    if wanted == segments:
        return cu_seqlens
    return pad(cu_seqlens, (0, wanted - segments), value=tokens)


def _tensors(batch: LocalBatch) -> list[Tensor]:
    return [getattr(batch, field.name) for field in fields(batch)]


class _LastOperation(TorchDispatchMode):
    """Keeps the name of the last operation, for the message of a failure."""

    name = "none"

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.name = str(func)
        return func(*args, **(kwargs or {}))
