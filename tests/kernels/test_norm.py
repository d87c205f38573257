"""RMSNorm and the weighted residual against their float64 oracles, on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.norm import blocked
from kernels.norm.norm import add_rms_norm, rms_norm, weighted_residual
from tests.kernels.norm_cases import (
    EPS,
    OPERATIONS,
    assert_one_output_is_enough,
    assert_small_rows_feel_eps,
    assert_statistics_are_of_the_result,
    inputs,
)
from tests.kernels.operation_cases import DTYPES, assert_matches, assert_repeatable

names = pytest.mark.parametrize("name", OPERATIONS)


@names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 48), (300, 1, 17), (1, 4096)], ids=str)
def test_matches_naive(name, shape, dtype):
    assert_matches(*OPERATIONS[name][:2], inputs(name, shape, dtype))


@names
@pytest.mark.parametrize("block", [1, 50, 100, 1000])
def test_any_block_of_rows(name, block, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)
    assert_matches(*OPERATIONS[name][:2], inputs(name, (13, 20), torch.bfloat16))
    assert_matches(*OPERATIONS[name][:2], inputs(name, (13, 20)))


@names
def test_small_rows_feel_eps(name):
    assert_small_rows_feel_eps(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_what_is_returned(dtype):
    assert_statistics_are_of_the_result(dtype)


@names
@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=3), channels=st.integers(8, 80))
def test_any_shape(name, shape, channels):
    assert_matches(*OPERATIONS[name][:2], inputs(name, (*shape, channels)))


@names
def test_gradients_to_float64_precision(name):
    given = [t.double().requires_grad_() for t in inputs(name, (3, 5))]
    assert torch.autograd.gradcheck(OPERATIONS[name][0], given)


@names
def test_inputs_that_are_not_contiguous(name):
    given = inputs(name, (6, 5, 32))
    assert_matches(*OPERATIONS[name][:2], [t.transpose(0, 1) if t.ndim > 1 else t for t in given])


@names
def test_no_rows(name):
    operation, _, tensors, _ = OPERATIONS[name]
    given = [t[:0] if i < tensors else t for i, t in enumerate(inputs(name, (2, 8)))]
    leaves = [t.requires_grad_() for t in given]
    outputs = operation(*leaves)
    first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    grads = torch.autograd.grad(first.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert first.shape == (0, 8)
    assert all(not grad.any() for grad in grads)


@names
def test_repeatable(name):
    assert_repeatable(OPERATIONS[name][0], inputs(name, (200, 64), torch.bfloat16))


@names
def test_naive_can_be_forced(name, monkeypatch):
    monkeypatch.setenv("TRANSXSSM_KERNELS", "naive")
    assert_matches(*OPERATIONS[name][:2], inputs(name, (2, 7, 48), torch.bfloat16))


def test_fused_pass_is_the_two_operations():
    h, update, r, w = inputs("both", (40, 96), torch.bfloat16)
    new_h, u = add_rms_norm(h, update, r, w, EPS)
    assert torch.equal(new_h, weighted_residual(h, update, r))
    assert torch.equal(u, rms_norm(new_h, w, EPS))
    torch.testing.assert_close(u, F.rms_norm(new_h, (96,), w, EPS))


def test_saves_no_more_than_inputs_and_outputs():
    h, update, r, w = (t.requires_grad_() for t in inputs("both", (40, 96), torch.bfloat16))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        new_h, _ = add_rms_norm(h, update, r, w, EPS)
    allowed = {t.data_ptr() for t in (h, new_h, r, w)}
    assert {t.data_ptr() for t in saved} == allowed


def test_outputs_own_their_memory():
    """A pipeline stage's output is freed by hand, which Megatron-core refuses for views."""
    for name in ("norm", "residual", "both"):
        outputs = OPERATIONS[name][0](*(t.requires_grad_() for t in inputs(name, (5, 1, 8))))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(t._base is None for t in outputs)


@pytest.mark.parametrize(("name", "read"), [("branch", 0), ("branch", 1), ("both", 0), ("both", 1)])
def test_an_output_that_nobody_reads_has_no_gradient(name, read):
    """As the last residual of a model, whose h' only the final norm reads."""
    assert_one_output_is_enough(name, read)


@pytest.mark.parametrize(
    ("name", "bad", "error", "says"),
    [
        ("h", torch.zeros(()), ValueError, r"h has shape \(\); expected \[\.\.\., N\]"),
        ("h", torch.zeros(3, 0), ValueError, "h has shape .* N at least 1"),
        ("h", torch.zeros(3, 8).int(), TypeError, "h has dtype torch.int32"),
        ("update", torch.zeros(4, 8), ValueError, r"update has shape \(4, 8\); expected \(3, 8\)"),
        ("update", torch.zeros(3, 8).half(), TypeError, "update has dtype torch.float16"),
        ("residual_weight", torch.zeros(7), ValueError, "residual_weight has shape"),
        ("norm_weight", torch.zeros(8, 1), ValueError, "norm_weight has shape"),
        ("norm_weight", torch.zeros(8).double(), TypeError, "norm_weight has dtype"),
        ("norm_weight", torch.zeros(8, device="meta"), ValueError, "norm_weight is on meta"),
    ],
)
def test_bad_input_is_named(name, bad, error, says):
    good = {
        "h": torch.zeros(3, 8), "update": torch.zeros(3, 8),
        "residual_weight": torch.zeros(8), "norm_weight": torch.zeros(8), "eps": EPS,
    }  # fmt: skip
    with pytest.raises(error, match=says):
        add_rms_norm(**(good | {name: bad}))
