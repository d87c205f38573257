"""The pipeline split by cost, against brute force."""

from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.config import ModelConfig, ParallelConfig
from parallel.flops import head_flops, layer_flops, training_flops_per_token
from parallel.split import balanced_counts, layer_chunks


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=4, max_size=8),
    st.integers(1, 4),
    st.integers(0, 8),
)
def test_slowest_is_minimal_and_then_the_fullest(
    layers: list[tuple[int, int]], chunks: int, head: int
) -> None:
    def time(first: int, end: int, index: int) -> float:
        return sum(t for t, _ in layers[first:end]) + head * (index == chunks - 1)

    def memory(first: int, end: int, index: int) -> float:
        return sum(m for _, m in layers[first:end]) * (chunks - index)

    def largest(counts: tuple[int, ...]) -> tuple[float, float]:
        ends = [0, *accumulate(counts)]
        parts = [(a, b, i) for i, (a, b) in enumerate(pairwise(ends))]
        return max(time(*part) for part in parts), max(memory(*part) for part in parts)

    counts = balanced_counts(len(layers), chunks, time, memory)
    assert sum(counts) == len(layers)
    assert min(counts) >= 1
    splits = combinations(range(1, len(layers)), chunks - 1)
    every = (tuple(b - a for a, b in pairwise([0, *ends, len(layers)])) for ends in splits)
    assert largest(tuple(counts)) == min(map(largest, every))


@given(
    st.integers(2, 24), st.integers(1, 8), st.integers(2, 4), st.integers(1, 60), st.integers(6, 12)
)
def test_balanced_is_never_slower_than_equal(
    num_layers: int, period: int, pipeline: int, vocab: int, length: int
) -> None:
    each = max(1, num_layers // pipeline)
    model = ModelConfig(
        num_layers=each * pipeline, attn_layer_period=period, attn_layer_offset=period - 1,
        vocab_size=vocab * 1000,
    )  # fmt: skip

    def slowest(split: Any) -> float:
        parallel = ParallelConfig(pipeline=pipeline, pipeline_split=split)
        chunks = layer_chunks(model, parallel, 2**length)
        times = [sum(layer_flops(model, i, 2**length) for i in chunk) for chunk in chunks]
        return max([*times[:-1], times[-1] + head_flops(model)])

    assert slowest("balanced") <= slowest([each] * pipeline) * (1 + 1e-12)


def test_equal_times_leave_memory_to_decide() -> None:
    # a stage has three layers at least once; the first has most micro-batches in flight
    model = ModelConfig(num_layers=7, vocab_size=2, attn_layer_offset=8)
    chunks = layer_chunks(model, ParallelConfig(pipeline=3), 1024)
    assert [len(chunk) for chunk in chunks] == [2, 3, 2]


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
