"""The one-token step against the float64 recurrence and the scan, on the CPU."""

import pytest
import torch

from kernels.ssd.ssd import ssd
from kernels.ssd.step import ssd_step
from tests.kernels.operation_cases import DTYPES
from tests.kernels.scan_cases import make_inputs, relative_error
from tests.kernels.step_cases import assert_step_matches, exact_step, step_inputs, walk


@pytest.mark.parametrize("choice", ["torch", "naive"])
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 4, 2, 16, 8), (1, 6, 1, 5, 32)], ids=str)
def test_matches_recurrence(size, dtype, state_dtype, choice, monkeypatch):
    monkeypatch.setenv("TRANSXSSM_KERNELS", choice)
    assert_step_matches(step_inputs(*size, dtype, state_dtype))


@pytest.mark.parametrize("missing", ["rotation", "D", "both"])
def test_optional_inputs_may_be_absent(missing):
    inputs = step_inputs(2, 4, 2, 16, 8)
    if missing != "D":
        inputs |= {"cos": None, "sin": None}
    if missing != "rotation":
        inputs |= {"D": None}
    assert_step_matches(inputs)


def test_float64():
    inputs = {n: t.double() for n, t in step_inputs(2, 4, 2, 16, 8).items()}
    inputs |= {n: inputs[n].float() for n in ("cos", "sin")}
    (y, state), (exact_y, exact_state) = ssd_step(**inputs), exact_step(**inputs)
    assert relative_error(y, exact_y) < 1e-14
    assert relative_error(state, exact_state) < 1e-14


@pytest.mark.parametrize("groups", [1, 4])
def test_repeated_steps_equal_the_scan(groups):
    inputs = make_inputs(2, 40, groups=groups)
    y, final_state = ssd(**inputs, output_final_state=True)
    outputs, state = walk(inputs, 0, 40, inputs["initial_state"])
    assert relative_error(outputs, y) <= 5e-6
    assert relative_error(state, final_state) <= 5e-6


def test_steps_continue_a_scan():
    inputs = make_inputs(2, 40)
    expected = ssd(**inputs)
    prompt = {
        name: value[:, :33].contiguous() if value.ndim > 1 and value.shape[:2] == (2, 40) else value
        for name, value in inputs.items()
    } | {"cu_seqlens": torch.tensor([0, 33, 66])}
    _, state = ssd(**prompt, output_final_state=True)
    outputs, _ = walk(inputs, 33, 40, state)
    assert relative_error(outputs, expected[:, 33:]) <= 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_in_place(dtype):
    inputs = step_inputs(2, 4, 2, 16, 8, torch.float32, dtype)
    before = inputs["state"].clone()
    y, after = ssd_step(**inputs)
    assert torch.equal(inputs["state"], before)
    y_again, same = ssd_step(**inputs, out_state=inputs["state"])
    assert same is inputs["state"]
    assert torch.equal(same, after)
    assert torch.equal(y_again, y)


def test_views_of_one_projection():
    inputs = step_inputs(2, 4, 4, 16, 16)
    packed = torch.cat([inputs[n] for n in ("x", "B", "C")], dim=2)
    views = dict(zip(("x", "B", "C"), packed.split(16, dim=2), strict=True))
    assert_step_matches(inputs | views)


def test_is_not_recorded():
    inputs = step_inputs(2, 4, 2, 16, 8)
    y, state = ssd_step(**(inputs | {"x": inputs["x"].requires_grad_()}))
    assert not y.requires_grad
    assert not state.requires_grad


@pytest.mark.parametrize(
    ("name", "bad", "error", "says"),
    [
        ("state", torch.zeros(2, 4, 16, 9), ValueError, r"state has shape .* \(2, 4, 16, 8\)"),
        ("state", torch.zeros(2, 4, 16, 8).double(), TypeError, "state has dtype torch.float64"),
        ("state", torch.zeros(2, 4, 8, 16).mT, ValueError, "state is not contiguous"),
        ("x", torch.zeros(2, 1, 4, 16), ValueError, r"x has shape .* expected \[B, H, P\]"),
        ("x", torch.zeros(2, 4, 16).int(), TypeError, "x has dtype torch.int32"),
        ("x", torch.zeros(2, 16, 4).mT, ValueError, r"x has strides .* x\.contiguous\(\)"),
        ("dt", torch.zeros(2, 4, 1), ValueError, r"dt has shape .* expected \(2, 4\)"),
        ("dt", torch.zeros(2, 4).half(), TypeError, "dt has dtype torch.float16"),
        ("A", torch.zeros(1), ValueError, "A has shape"),
        ("A", torch.zeros(4).half(), TypeError, "A has dtype"),
        ("A", torch.zeros(4, device="meta"), ValueError, "A is on meta; expected c"),
        ("B", torch.zeros(2, 3, 8), ValueError, "B has shape .* with G dividing 4 heads"),
        ("B", torch.zeros(2, 2, 7), ValueError, "B has N=7; RoPE rotates pairs"),
        ("C", torch.zeros(2, 4, 8), ValueError, r"C has shape .* expected \(2, 2, 8\)"),
        ("cos", torch.zeros(2, 8), ValueError, r"cos has shape .* expected \(2, 4\)"),
        ("sin", None, ValueError, "sin is None; pass both cos and sin or none"),
        ("dt_bias", torch.zeros(2), ValueError, "dt_bias has shape"),
        ("D", torch.zeros(2, 4), ValueError, "D has shape"),
        ("out_state", torch.zeros(2, 4, 16, 8).half(), TypeError, "out_state has dtype"),
        ("out_state", torch.zeros(2, 4, 8, 16).mT, ValueError, "out_state is not contiguous"),
    ],
)
def test_bad_input_is_named(name, bad, error, says):
    with pytest.raises(error, match=says):
        ssd_step(**(step_inputs(2, 4, 2, 16, 8) | {name: bad}))
