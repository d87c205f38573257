"""The SwiGLU product against its float64 oracle, on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from kernels.slices import shared_stride
from kernels.swiglu.naive import swiglu_naive
from kernels.swiglu.swiglu import swiglu
from tests.kernels.operation_cases import (
    DTYPES,
    assert_matches,
    normal,
    outputs_and_gradients,
    side_by_side,
)


def inputs(*shape, dtype=torch.float32):
    return [4 * normal(*shape, dtype=dtype, seed=i) for i in range(2)]


@pytest.mark.parametrize("choice", ["torch", "naive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 40), (1000,)], ids=str)
def test_matches_naive(shape, dtype, choice, monkeypatch):
    monkeypatch.setenv("TRANSXSSM_KERNELS", choice)
    assert_matches(swiglu, swiglu_naive, inputs(*shape, dtype=dtype))


def test_oracle_is_silu_times_up():
    gate, up = (t.double() for t in inputs(50))
    torch.testing.assert_close(swiglu_naive(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize(
    ("gate", "up", "error", "says"),
    [
        (torch.zeros(3).int(), torch.zeros(3), TypeError, "gate has dtype torch.int32"),
        (torch.zeros(3), torch.zeros(4), ValueError, r"up has shape \(4,\); expected \(3,\)"),
        (torch.zeros(3), torch.zeros(3).half(), TypeError, "up has dtype torch.float16"),
        (torch.zeros(3), torch.zeros(3, device="meta"), ValueError, "up is on meta"),
    ],
)
def test_bad_input_is_named(gate, up, error, says):
    with pytest.raises(error, match=says):
        swiglu(gate, up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_one_buffer(dtype):
    gate, up = inputs(3, 5, 40, dtype=dtype)
    columns = side_by_side((gate, up), rest=3)
    found, expected = (outputs_and_gradients(swiglu, pair) for pair in (columns, (gate, up)))
    for result, other in zip(found, expected, strict=True):  # the ends of rows are not vectorised
        torch.testing.assert_close(result, other)
    assert shared_stride(found[1:]) == 83
