"""Which layers a pipeline stage holds: contiguous, the slowest stage as fast as can be."""

from parallel.config import ModelConfig, ParallelConfig
from parallel.flops import head_flops, layer_flops


def layer_chunks(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[range]:
    """Global layer numbers of every chunk; chunk i is on stage i mod pipeline.

    "balanced" minimises the cost of the slowest chunk, counting matrix products and mixers by their
    FLOPs and the output head on the last; among equals it prefers the most even split.
    There must be at least as many layers as chunks.
    """
    chunks = parallel.num_chunks
    if parallel.pipeline_split != "balanced":
        counts = list(parallel.pipeline_split)
    else:
        costs = [layer_flops(model, i, seq_len) for i in range(model.num_layers)]
        counts = balanced_counts(costs, chunks, head_flops(model))
    ends = [sum(counts[: i + 1]) for i in range(chunks)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def balanced_counts(costs: list[float], stages: int, last_extra: float) -> list[int]:
    """Numbers of consecutive layers per stage (each ≥ 1) that minimise the largest stage cost.

    `last_extra` is added to the last stage. Dynamic programme over (stages, layers):
    best[s][n] = min over k of max(best[s-1][k], cost of layers k..n-1).
    """
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    total = len(costs)

    def stage_cost(first: int, end: int, stage: int) -> float:
        return prefix[end] - prefix[first] + (last_extra if stage == stages - 1 else 0.0)

    # value: (slowest stage, sum of squares as tie-break, counts)
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(stages):
        layer: dict[int, tuple[float, float, list[int]]] = {}
        for end in range(stage + 1, total - (stages - stage - 1) + 1):
            options = []
            for first, (slowest, squares, counts) in best.items():
                if first < end:
                    cost = stage_cost(first, end, stage)
                    options.append(
                        (max(slowest, cost), squares + cost * cost, [*counts, end - first])
                    )
            layer[end] = min(options)
        best = layer
    return best[total][2]
