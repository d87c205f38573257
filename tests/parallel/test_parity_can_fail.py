"""The comparison of layouts is worth something: each gradient sum left out turns it red."""

from collections.abc import Callable

import pytest

from benchmarks.parity import BOUNDS, Layout, Trace, assemble, train
from benchmarks.ranks import run_ranks


def forget_norms_under_sequence_parallelism() -> None:
    from parallel.layers import ReplicatedScale

    ReplicatedScale.scale = lambda self: self.weight  # type: ignore[method-assign]


def forget_inputs_of_projections() -> None:
    from parallel import layers

    layers.copy_to_tensor_model_parallel_region = lambda t: t


def forget_tied_embedding() -> None:
    from parallel.zero import ZeroOptimizer

    ZeroOptimizer._embedding_is_shared = lambda self: False  # type: ignore[method-assign]


def forget_context_ranks() -> None:
    from megatron.core import parallel_state

    from parallel import zero

    zero.replicas_group = parallel_state.get_data_parallel_group


def forget_passed_states() -> None:
    from parallel import mixers

    mixers.add_earlier_ranks = lambda y, *rest: y


def train_forgetting(forget: Callable[[], None], layout: Layout) -> Trace:
    forget()
    return train(layout, 1)


@pytest.fixture(scope="module")
def one() -> Trace:
    return run_ranks(1, train, Layout(1, {}), 1)[0]


@pytest.mark.parametrize(
    ("forget", "layout"),
    [
        (forget_norms_under_sequence_parallelism, Layout(2, {"tensor": 2})),
        (forget_inputs_of_projections, Layout(2, {"tensor": 2, "sequence": False})),
        (forget_tied_embedding, Layout(2, {"pipeline": 2})),
        (forget_context_ranks, Layout(2, {"context": 2})),
        (forget_passed_states, Layout(2, {"context": 2})),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_forgotten_sum_shows(forget: Callable[[], None], layout: Layout, one: Trace) -> None:
    ranks = run_ranks(layout.world_size, train_forgetting, forget, layout)
    expected = assemble([one.gradients])
    found = assemble([trace.gradients for trace in ranks])
    worst = max((found[name] - g).norm() / g.norm() for name, g in expected.items())
    assert not worst <= 10 * BOUNDS["fp32"]["gradient"]
