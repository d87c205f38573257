"""No layout lets a document change the loss or a gradient of the others by a single bit."""

from typing import Any

import pytest

from benchmarks.parity import Layout, train
from benchmarks.ranks import run_ranks

LAYOUTS = [
    Layout(1, {}),
    Layout(2, {"tensor": 2}),
    Layout(2, {"zero_stage": 3}, dtype="bf16"),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    Layout(4, {"pipeline": 2, "context": 2}, dtype="bf16"),
    Layout(4, {"context": 4, "recompute": "selective"}),
    Layout(8, {"tensor": 2, "context": 4}),  # a ring
    Layout(2, {"context": 2}, packed=False),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_documents_keep_to_themselves(layout: Layout) -> None:
    assert not any(trace.leaks for trace in run_ranks(layout.world_size, train, layout, 1))


def train_without_borders(layout: Layout) -> Any:
    import kernels.attention
    import parallel.mixers

    def whole_rows(q: Any, k: Any, v: Any, cu_seqlens: Any) -> Any:
        return kernels.attention._causal(q, k, v, None)

    parallel.mixers.attention = whole_rows
    return train(layout, 1)


def test_a_leak_would_show() -> None:
    assert run_ranks(1, train_without_borders, Layout(1, {}))[0].leaks
