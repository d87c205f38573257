"""Which layers a pipeline stage holds: contiguous, the slowest stage as fast as can be."""

from collections.abc import Callable

from parallel.config import ModelConfig, ParallelConfig
from parallel.flops import head_flops, layer_flops
from parallel.footprint import (
    Workload,
    chunks_in_flight,
    embedding_parameters,
    layer_activations,
    layer_parameters,
)

STATE_BYTES = 18  # of a parameter in training: bf16, its gradient, float32 master and two moments
Cost = Callable[[int, int, int], float]  # of layers first to end - 1 as chunk `index`


def layer_chunks(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[range]:
    """Global layer numbers of every chunk; chunk i is on stage i mod pipeline.

    "balanced" minimises the time of the slowest chunk, counting matrix products and mixers by their
    FLOPs and the output head on the last; among equals, the memory of the fullest one, counting
    training state and the activations in flight of micro-batches of one sequence.
    There must be at least as many layers as chunks.
    """
    chunks, num_layers = parallel.num_chunks, model.num_layers
    if parallel.pipeline_split != "balanced":
        counts = list(parallel.pipeline_split)
    elif chunks == 1:
        counts = [num_layers]
    else:
        time = _time(model, seq_len, chunks)
        counts = balanced_counts(num_layers, chunks, time, _memory(model, parallel, seq_len))
    ends = [sum(counts[: i + 1]) for i in range(chunks)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def balanced_counts(num_layers: int, chunks: int, time: Cost, memory: Cost) -> list[int]:
    """Layers of each chunk (≥ 1): the least slowest time, and for that the least fullest memory."""
    even = [num_layers * (i + 1) // chunks - num_layers * i // chunks for i in range(chunks)]
    bound = _slowest(even, time)  # of the least slowest time, which spares looks at long chunks
    first_pass = _least_largest(num_layers, chunks, time, time, bound)
    slowest = _slowest(first_pass, time)
    return _least_largest(num_layers, chunks, memory, time, slowest)


def _slowest(counts: list[int], time: Cost) -> float:
    """Time of the slowest of chunks of so many layers."""
    slowest, first = 0.0, 0
    for index, count in enumerate(counts):
        slowest = max(slowest, time(first, first + count, index))
        first += count
    return slowest


def _least_largest(
    num_layers: int, chunks: int, cost: Cost, time: Cost, slowest: float
) -> list[int]:
    """Counts that minimise the largest cost where no chunk's time exceeds `slowest`; among equals,
    the most even times. Dynamic programme over (chunks, layers):
    best[i][n] = min over k of max(best[i-1][k], cost of layers k..n-1).
    """
    # value: (largest cost, sum of squared times, counts)
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for index in range(chunks):
        reached: dict[int, tuple[float, float, list[int]]] = {}
        for end in range(index + 1, num_layers - (chunks - index - 1) + 1):
            chosen: tuple[float, float, list[int]] | None = None
            for first in range(end - 1, -1, -1):  # longer and longer, so slower and slower
                seconds = time(first, end, index)
                if seconds > slowest:
                    break
                if first not in best:
                    continue
                largest, squares, counts = best[first]
                largest, squares = max(largest, cost(first, end, index)), squares + seconds**2
                if chosen is None or (largest, squares) <= chosen[:2]:
                    option = (largest, squares, [*counts, end - first])
                    chosen = option if chosen is None else min(chosen, option)
            if chosen is not None:
                reached[end] = chosen
        best = reached
    return best[num_layers][2]


def _time(model: ModelConfig, seq_len: int, chunks: int) -> Cost:
    before = _running([layer_flops(model, i, seq_len) for i in range(model.num_layers)])
    head = head_flops(model)
    return lambda first, end, index: before[end] - before[first] + head * (index == chunks - 1)


def _memory(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> Cost:
    work = Workload(1, seq_len, 1, parallel.pipeline, itemsize=2)
    layers = range(model.num_layers)
    state = _running([STATE_BYTES * layer_parameters(model, parallel, i) for i in layers])
    kept = _running([layer_activations(model, parallel, work, i, False) for i in layers])
    table = STATE_BYTES * embedding_parameters(model, parallel)

    def memory(first: int, end: int, index: int) -> float:
        in_flight = chunks_in_flight(parallel, work.micro_batches, index % parallel.pipeline)
        activations = (kept[end] - kept[first]) * in_flight / parallel.virtual_pipeline
        ends = (index == 0) + (index == parallel.num_chunks - 1)
        return state[end] - state[first] + activations + table * ends

    return memory


def _running(values: list[float] | list[int]) -> list[float]:
    """Sums of the first n values, n from 0."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums
