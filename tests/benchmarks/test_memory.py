"""The memory model beside what ranks really hold: some of `python -m benchmarks.memory`."""

from typing import Any

import pytest

from benchmarks import memory
from benchmarks.parity import Layout
from benchmarks.ranks import run_ranks

LAYOUTS = [
    Layout(1, {"recompute": "selective"}),
    Layout(2, {"zero_stage": 3}, dtype="bf16"),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    Layout(4, {"tensor": 2, "context": 2}, dtype="bf16"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_category_is_within_its_bound(layout: Layout) -> None:
    for rank, found in enumerate(run_ranks(layout.world_size, memory.measure, layout)):
        predicted = memory.predict(layout, rank)
        ratios = {name: memory.compared(found, predicted, name) for name in memory.NAMES}
        assert sum(ratio is not None for ratio in ratios.values()) >= 6
        for name, ratio in ratios.items():
            assert ratio is None or abs(ratio - 1) <= memory.BOUND, (rank, name, found, predicted)


def keep_more(layout: Layout) -> dict[str, Any]:
    import parallel.layers

    swiglu = parallel.layers.swiglu
    parallel.layers.swiglu = lambda gate, up: swiglu(gate, up).exp().log()
    return memory.measure(layout)


def test_a_layer_that_keeps_more_shows() -> None:
    found = run_ranks(1, keep_more, LAYOUTS[0])[0]
    ratio = memory.compared(found, memory.predict(LAYOUTS[0], 0), "activations")
    assert ratio is not None
    assert ratio < 1 - memory.BOUND
