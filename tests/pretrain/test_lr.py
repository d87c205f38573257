"""Learning-rate schedules: warm-up, decay, their ends, and no jumps between."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.lr import learning_rate
from pretrain.sections import OptimizerConfig

STEPS, TOKENS_PER_STEP = 200, 4096
TOTAL = STEPS * TOKENS_PER_STEP


def rates(**fields: Any) -> list[float]:
    """The rate of every update of a run."""
    config = OptimizerConfig(**fields)
    return [learning_rate(config, (s + 1) * TOKENS_PER_STEP, TOTAL) for s in range(STEPS)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_is_linear_from_the_first_update_to_the_peak(schedule: str) -> None:
    found = rates(lr=2e-3, schedule=schedule, warmup_fraction=0.1)
    assert found[:20] == pytest.approx([2e-3 * (s + 1) / 20 for s in range(20)])
    assert max(found) == found[19] == 2e-3


def test_cosine_is_half_way_down_at_half_time() -> None:
    found = rates(lr=1e-3, schedule="cosine", warmup_fraction=0.1, min_lr_ratio=0.2)
    middle = 20 + 90 - 1  # half of the 180 updates after warm-up
    assert found[middle] == pytest.approx(1e-3 * (0.2 + 0.8 / 2))
    after = found[19:]
    assert all(a > b for a, b in pairwise(after))


def test_wsd_is_stable_and_then_falls_linearly() -> None:
    found = rates(
        lr=1e-3, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.25, min_lr_ratio=0.2
    )
    assert set(found[19:150]) == {1e-3}
    drops = [a - b for a, b in pairwise(found[149:])]
    assert drops == pytest.approx([1e-3 * 0.8 / 50] * 50)


@settings(deadline=None)
@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    lr=st.floats(1e-6, 1e-1),
    ratio=st.floats(0, 1),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0.01, 0.5),
)
def test_any_schedule_rises_once_falls_once_and_ends_at_its_minimum(
    schedule: str, lr: float, ratio: float, warmup: float, decay: float
) -> None:
    fields = {"warmup_fraction": warmup, "decay_fraction": decay, "min_lr_ratio": ratio}
    found = rates(lr=lr, schedule=schedule, **fields)
    assert found[-1] == lr * ratio  # exactly
    assert found[0] > 0
    assert max(found) <= lr
    peak = found.index(max(found))
    slack = lr * 1e-12  # rounding
    assert all(a <= b + slack for a, b in pairwise(found[: peak + 1]))
    assert all(a >= b - slack for a, b in pairwise(found[peak:]))


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(lr=1e-3, schedule="wsd", warmup_fraction=0.0)[0] == 1e-3


def test_schedule_depends_on_tokens_not_on_steps() -> None:
    config = OptimizerConfig()
    coarse = [learning_rate(config, t, TOTAL) for t in range(8192, TOTAL + 1, 8192)]
    fine = [learning_rate(config, t, TOTAL) for t in range(4096, TOTAL + 1, 4096)]
    assert coarse == fine[1::2]
