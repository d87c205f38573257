"""The Triton SwiGLU product against its float64 oracle."""

import pytest
import torch

from kernels.slices import shared_stride
from kernels.swiglu.naive import swiglu_naive
from kernels.swiglu.swiglu import swiglu
from tests.kernels.operation_cases import (
    DTYPES,
    assert_matches,
    assert_repeatable,
    outputs_and_gradients,
    side_by_side,
)
from tests.kernels.test_swiglu import inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 1, 40), (5, 1000)], ids=str)
def test_matches_naive(shape, dtype):
    assert_matches(swiglu, swiglu_naive, inputs(*shape, dtype=dtype))


def test_gates_far_from_zero():
    gate = torch.tensor([-500.0, -90.0, -20.0, 0.0, 20.0, 90.0, 500.0, 1e4])
    assert_matches(swiglu, swiglu_naive, [gate, torch.ones(8)])


def test_inputs_that_are_not_contiguous():
    assert_matches(swiglu, swiglu_naive, inputs(6, 40)[0].split(20, dim=1))


def test_repeatable():
    assert_repeatable(swiglu, inputs(3000, dtype=torch.bfloat16))


def test_saves_its_inputs_alone():
    gate, up = (t.requires_grad_() for t in inputs(40))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 1, 40, 0), (5, 1, 333, 7), (2, 3, 1000, 16)], ids=str)
def test_columns_of_one_buffer_are_read_where_they_lie(size, dtype):
    """Bit for bit as contiguous ones, and gradients in one buffer."""
    *tokens, width, rest = size
    gate, up = inputs(*tokens, width, dtype=dtype)
    columns = side_by_side((gate, up), rest)
    assert shared_stride(columns) == 2 * width + rest
    found, expected = (outputs_and_gradients(swiglu, pair) for pair in (columns, (gate, up)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert shared_stride(found[1:]) == 2 * width + rest
