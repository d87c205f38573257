"""The Triton step against the float64 recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ssd.naive import ssd_naive
from kernels.ssd.step import ssd_step
from tests.kernels.operation_cases import DTYPES
from tests.kernels.scan_cases import make_inputs, relative_error
from tests.kernels.step_cases import assert_step_matches, exact_step, step_inputs, walk


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 4, 2, 16, 8), (1, 3, 1, 128, 128)], ids=str)
def test_matches_recurrence(size, dtype, state_dtype):
    assert_step_matches(step_inputs(*size, dtype, state_dtype))


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 2), per_group=st.integers(1, 3),
    head_dim=st.integers(1, 40), half=st.integers(1, 70),
)  # fmt: skip
def test_any_shape(batch, groups, per_group, head_dim, half):
    assert_step_matches(step_inputs(batch, groups * per_group, groups, head_dim, 2 * half))


@pytest.mark.parametrize("state_dim", [3, 7, 16])
@pytest.mark.parametrize("skip", [True, False])
def test_without_rotation(state_dim, skip):
    inputs = step_inputs(2, 4, 2, 16, 2 * state_dim)
    inputs |= {n: inputs[n][..., :state_dim].contiguous() for n in ("state", "B", "C")}
    inputs |= {"cos": None, "sin": None} | ({} if skip else {"D": None})
    assert_step_matches(inputs)


def test_steps_from_tiny_to_large():
    """softplus keeps its digits where exp(z) vanishes beside 1, and where it overflows."""
    z = torch.tensor([-80.0, -30, -17, -12, -7, -3, 0, 3, 15, 30, 89, 200])
    inputs = step_inputs(1, 12, 12, 4, 4)
    inputs |= {"dt": z[None], "dt_bias": torch.zeros(12), "A": torch.full((12,), -1e-3)}
    inputs |= {"state": torch.zeros_like(inputs["state"]), "D": None}
    _, state = ssd_step(**inputs)
    _, expected = exact_step(**inputs)
    for found, exact in zip(state[0], expected[0], strict=True):  # head by head
        assert relative_error(found, exact) <= 2e-6  # a GPU's exp has two bits less


def test_repeated_steps_equal_the_recurrence():
    inputs = make_inputs(2, 12, groups=2)
    y, final_state = ssd_naive(**inputs, output_final_state=True)
    outputs, state = walk(inputs, 0, 12, inputs["initial_state"])
    assert relative_error(outputs, y) <= 5e-6
    assert relative_error(state, final_state) <= 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_in_place(dtype):
    inputs = step_inputs(2, 4, 2, 130, 16, torch.bfloat16, dtype)
    y, after = ssd_step(**inputs)
    y_again, same = ssd_step(**inputs, out_state=inputs["state"])
    assert same is inputs["state"]
    assert torch.equal(same, after)
    assert torch.equal(y_again, y)


def test_views_of_one_projection():
    inputs = step_inputs(2, 4, 4, 16, 16, torch.bfloat16)
    packed = torch.cat([inputs[n] for n in ("x", "B", "C")], dim=2)
    views = dict(zip(("x", "B", "C"), packed.split(16, dim=2), strict=True))
    assert_step_matches(inputs | views)
