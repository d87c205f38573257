"""A micro-batch as one launch: forward, loss and backward, captured once a shape and replayed.

The host needs longer to issue a micro-batch's operations than a GPU needs for many of them. A CUDA
graph issues them all at once: its inputs are copied into buffers that stay, and gradients add up in
the optimizer's buffers, as in eager execution. Shapes are what a graph is captured for: those of
the tokens, and the number of segments, rounded up to a power of two by repeating the last border.

On a CPU a recording stands in for the graph (`parallel.replay`): the same path through this file,
for tests and campaigns.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from parallel.replay import Replay
from parallel.schedule import row_sums, run_schedule
from parallel.zero import ZeroOptimizer

WARM_UP = 2  # micro-batches of a shape that run eagerly, before it is captured
MOST_GRAPHS = 12  # each has its inputs and a place in the memory that they share

log = logging.getLogger("transxssm")


class Graph(Protocol):
    """A call that is recorded, and then made again without Python."""

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of its result, which holds nothing of use before a replay."""

    def replay(self) -> None:
        """Make the call again."""


class CudaGraph:
    """torch.cuda.CUDAGraph, with memory that all graphs of a `pool` share."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """Capture a call, which computes nothing yet."""
        # of this thread alone: one that writes a checkpoint copies from the device meanwhile
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    inputs: LocalBatch
    sums: Tensor
    """`row_sums` of the newest micro-batch."""
    marked: list[Any]
    """Parameters whose sums of gradients it adds to."""


def why_eager(parallel: ParallelConfig) -> str | None:
    """Return why micro-batches of a layout cannot be captured, or None where they can."""
    if parallel.pipeline > 1:
        return f"parallel.pipeline={parallel.pipeline}: stages wait for each other within a step"
    if parallel.context > 1:
        return f"parallel.context={parallel.context}: ranks exchange tokens in a ring"
    if parallel.reduces_in_backward:
        offloaded = ", with an offloaded optimizer" if parallel.offload == "optimizer" else ""
        return (
            f"parallel.zero_stage={parallel.zero_stage}{offloaded}: DeepSpeed reduces gradients "
            "while they are computed"
        )
    return None


def graph_maker(device: torch.device) -> Callable[[], Graph]:
    """Return what makes a graph for a device."""
    if device.type == "cuda":
        return partial(CudaGraph, torch.cuda.graph_pool_handle())
    return Replay


class MicroBatchGraphs:
    """Runs a stage's micro-batches for `parallel.schedule.forward_backward`.

    The first of a shape run eagerly; so do all, from then on, after a capture that failed.
    """

    def __init__(self, zero: ZeroOptimizer, make: Callable[[], Graph]) -> None:
        """zero: of a layout without `why_eager`."""
        self._zero, self._make = zero, make
        self._parameters = [p for _, p in zero.built.named_parameters()]
        self._scale = torch.zeros((), device=self._parameters[0].device)
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._addresses: list[int] = []
        self._failed = False
        # DeepSpeed drops gradients that have no buffers of its own; a graph adds to these
        self._gradients = (
            [torch.zeros_like(p) for p in self._parameters] if zero.main_grads is None else []
        )

    def run(self, batches: Sequence[LocalBatch], scale: Tensor) -> list[Tensor]:
        """Add the gradients of micro-batches to those before; return `row_sums` of each.

        scale: of the loss, float32 scalar. Raises what a capture raises in strict mode.
        """
        self._forget_moved()
        self._scale.copy_(scale)
        self._lay_gradients()
        return [self._run(with_padded_borders(batch)) for batch in batches]

    def _run(self, batch: LocalBatch) -> Tensor:
        key = (*batch.tokens.shape, len(batch.cu_seqlens), len(batch.local_cu_seqlens))
        captured = self._captured.get(key) or self._captured_now(key, batch)
        if captured is None:
            return self._eager(batch)
        for buffer, given in zip(_tensors(captured.inputs), _tensors(batch), strict=True):
            buffer.copy_(given)
        captured.graph.replay()
        if self._zero.main_grads is not None:
            for parameter in captured.marked:  # Python, which a replay does not run
                self._zero.main_grads.mark(parameter)
        return captured.sums.clone()

    def _eager(self, batch: LocalBatch) -> Tensor:
        (sums,) = run_schedule(self._zero.scheduled_modules, [batch], self._scale, row_sums)
        return sums

    def _captured_now(self, key: tuple[int, ...], batch: LocalBatch) -> _Captured | None:
        """The graph of a shape that has come often enough, or None."""
        self._seen[key] += 1
        if self._failed or self._seen[key] <= WARM_UP or len(self._captured) >= MOST_GRAPHS:
            return None
        inputs = LocalBatch(*(tensor.clone() for tensor in _tensors(batch)))
        graph, watch = self._make(), _LastOperation()

        def watched() -> Tensor:
            with watch:
                return self._eager(inputs)

        try:
            with recording(), self._marks() as marked:
                sums = graph.record(watched)
        except Exception as error:
            if strict():
                raise
            self._failed = True
            log.warning(
                "a micro-batch cannot be captured (%s: %s; the last operation was %s): all run "
                'eagerly from now on; set training.cuda_graphs = "off" to be told no more',
                *(type(error).__name__, str(error).partition("\n")[0], watch.name),
            )
            return None
        log.info("captured a micro-batch of %s × %s tokens, %s borders", *key[:3])
        captured = self._captured[key] = _Captured(graph, inputs, sums, marked)
        return captured

    @contextmanager
    def _marks(self) -> Iterator[list[Any]]:
        """The parameters that a capture marks; none of them is, if it fails."""
        marked: list[Any] = []
        main_grads = self._zero.main_grads
        if main_grads is None:
            yield marked
            return
        with main_grads.noting(marked):
            yield marked

    def _lay_gradients(self) -> None:
        """Give parameters the buffers that graphs add to, at the begin of a step."""
        if not self._gradients:
            return
        torch._foreach_zero_(self._gradients)
        for parameter, buffer in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer

    def _forget_moved(self) -> None:
        """Drop the graphs if weights or sums of gradients lie elsewhere than they did."""
        sums = [getattr(p, "main_grad", p) for p in self._parameters]
        addresses = [tensor.data_ptr() for tensor in (*self._parameters, *sums)]
        if self._captured and addresses != self._addresses:
            log.info("weights have moved: micro-batches are captured anew")
            self._captured.clear()
        self._addresses = addresses


def with_padded_borders(batch: LocalBatch) -> LocalBatch:
    """The batch with as many segments as a power of two, of which the last may be empty.

    Rows that are single documents stay so, since attention has one call for them.
    """
    rows, tokens = len(batch.tokens), batch.tokens.numel()
    return replace(
        batch,
        cu_seqlens=padded_borders(batch.cu_seqlens, rows, tokens),
        local_cu_seqlens=padded_borders(batch.local_cu_seqlens, rows, tokens),
    )


def padded_borders(borders: Tensor, rows: int, tokens: int) -> Tensor:
    """Repeat the last border, `tokens`, until a power of two of segments is there."""
    segments = len(borders) - 1
    wanted = segments if segments == rows else 1 << (segments - 1).bit_length()
    return borders if wanted == segments else pad(borders, (0, wanted - segments), value=tokens)


def _tensors(batch: LocalBatch) -> list[Tensor]:
    return [getattr(batch, field.name) for field in fields(batch)]


class _LastOperation(TorchDispatchMode):
    """Knows the name of the last operation, for what is said of a failure."""

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
