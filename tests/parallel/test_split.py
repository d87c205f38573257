"""The pipeline split by cost, against brute force."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.config import ModelConfig, ParallelConfig
from parallel.flops import head_flops, layer_flops, training_flops_per_token
from parallel.split import balanced_counts, layer_chunks


@given(
    st.lists(st.floats(0.1, 10), min_size=4, max_size=9),
    st.integers(1, 4),
    st.floats(0, 20),
)
def test_slowest_stage_is_minimal(costs: list[float], stages: int, extra: float) -> None:
    def slowest(ends: tuple[int, ...]) -> float:
        borders = [0, *ends, len(costs)]
        sums = [sum(costs[a:b]) for a, b in pairwise(borders)]
        sums[-1] += extra
        return max(sums)

    counts = balanced_counts(costs, stages, extra)
    assert sum(counts) == len(costs)
    assert min(counts) >= 1
    found = tuple(sum(counts[: i + 1]) for i in range(stages - 1))
    best = min(slowest(ends) for ends in combinations(range(1, len(costs)), stages - 1))
    assert slowest(found) == pytest.approx(best)


def test_explicit_split_is_kept() -> None:
    parallel = ParallelConfig(pipeline=2, pipeline_split=[3, 5])
    assert layer_chunks(ModelConfig(), parallel, 64) == [range(0, 3), range(3, 8)]


def test_heavy_head_takes_layers_off_the_last_stage() -> None:
    model = ModelConfig(vocab_size=50_000)
    first, last = layer_chunks(model, ParallelConfig(pipeline=2), 1024)
    assert len(first) > len(last)
    assert len(first) + len(last) == model.num_layers


def test_flops_are_six_per_parameter_and_token_plus_mixers() -> None:
    model, seq_len = ModelConfig(ssd_groups=4), 1024
    matrices = sum(
        count for kind, count in model.num_params().items() if kind not in ("norm", "total")
    )
    mixers = training_flops_per_token(model, seq_len) - 6 * matrices
    attention = 3 * 2 * 4 * 64 * (seq_len + 1)
    scan = 3 * 4 * (2 * 64 * 64 + 2 * 64 * 64 + 4 * 64 * 64)
    assert mixers == pytest.approx(attention + 7 * scan, rel=1e-3)
    assert layer_flops(model, 7, seq_len) > layer_flops(model, 0, seq_len) > head_flops(model) / 10
