"""The Triton norm and residual against their float64 oracles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.norm import fused
from kernels.norm.norm import rms_norm
from tests.kernels.norm_cases import (
    OPERATIONS,
    assert_one_output_is_enough,
    assert_small_rows_feel_eps,
    assert_statistics_are_of_the_result,
    inputs,
)
from tests.kernels.operation_cases import (
    DTYPES,
    assert_matches,
    assert_repeatable,
    outputs_and_gradients,
)

names = pytest.mark.parametrize("name", OPERATIONS)


@names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 1, 96), (3, 1000), (1, 4096)], ids=str)
def test_matches_naive(name, shape, dtype):
    assert_matches(*OPERATIONS[name][:2], inputs(name, shape, dtype))


@names
def test_small_rows_feel_eps(name):
    assert_small_rows_feel_eps(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_what_is_returned(dtype):
    assert_statistics_are_of_the_result(dtype)


@names
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), channels=st.integers(8, 300))
def test_any_shape(name, rows, channels):
    assert_matches(*OPERATIONS[name][:2], inputs(name, (rows, channels)))


@names
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_rows_shared_among_programs(name, programs, monkeypatch):
    """Programs that walk over several tiles, the last of them not full."""
    for function in ("forward_programs", "backward_programs"):
        monkeypatch.setattr(fused, function, lambda *_: programs)
    assert_matches(*OPERATIONS[name][:2], inputs(name, (83, 90), torch.bfloat16))


@names
@pytest.mark.parametrize("programs", [1, 127, 129])
def test_any_number_of_partial_sums(name, programs, monkeypatch):
    """Of programs that have a row each, and of those that have none."""
    monkeypatch.setattr(fused, "backward_programs", lambda *_: programs)
    assert_matches(*OPERATIONS[name][:2], inputs(name, (83, 70)))


@pytest.mark.parametrize(("name", "read"), [("branch", 0), ("branch", 1), ("both", 0), ("both", 1)])
def test_an_output_that_nobody_reads_has_no_gradient(name, read):
    assert_one_output_is_enough(name, read)


@names
def test_no_rows(name):
    operation, _, tensors, _ = OPERATIONS[name]
    given = [t[:0] if i < tensors else t for i, t in enumerate(inputs(name, (2, 70)))]
    found = outputs_and_gradients(operation, given)
    assert all(not t.any() for t in found)


@names
def test_repeatable(name):
    assert_repeatable(OPERATIONS[name][0], inputs(name, (83, 90), torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "says"), [(torch.float32, "N=4097; .* 4096"), (torch.float64, "float64")]
)
def test_what_triton_cannot_run_is_refused_in_strict_mode(dtype, says, monkeypatch):
    h, weight = torch.ones(2, 4097, dtype=dtype), torch.ones(4097, dtype=dtype)
    with pytest.raises(ValueError, match=f"rms_norm: .*{says}"):
        rms_norm(h, weight, 1e-6)
    monkeypatch.setenv("TRANSXSSM_STRICT", "0")
    torch.testing.assert_close(rms_norm(h, weight, 0.0), h)
