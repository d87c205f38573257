"""Inputs of the one-token step and the oracle: the float64 recurrence over one token."""

import torch
from torch import Tensor

from kernels.ssd.naive import ssd_naive
from kernels.ssd.step import ssd_step
from tests.kernels.operation_cases import TOLERANCE
from tests.kernels.scan_cases import Inputs, make_inputs, relative_error

FIXED = ("A", "dt_bias", "D")
TOKEN = ("x", "dt", "B", "C", "cos", "sin")


def step_inputs(
    batch: int, heads: int, groups: int, head_dim: int, state_dim: int,
    dtype: torch.dtype = torch.float32, state_dtype: torch.dtype = torch.float32,
) -> Inputs:  # fmt: skip
    """A token at position 5, and a state to go on from."""
    sizes = {"heads": heads, "head_dim": head_dim, "state_dim": state_dim, "groups": groups}
    scan = make_inputs(batch, 6, **sizes, dtype=dtype)
    state = scan["initial_state"].to(state_dtype)
    return {"state": state} | {n: scan[n] for n in FIXED} | {n: scan[n][:, 5] for n in TOKEN}


def exact_step(state: Tensor, **inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the state after the token, float64; arguments as `ssd_step`."""
    token = {n: t if (t := inputs[n]) is None else t.unsqueeze(1) for n in TOKEN}
    y, after = ssd_naive(
        **token, **{n: inputs.get(n) for n in FIXED}, initial_state=state,
        cu_seqlens=torch.arange(len(state) + 1), output_final_state=True,
    )  # fmt: skip
    return y.squeeze(1), after


def assert_step_matches(inputs: Inputs) -> None:
    (y, state), (exact_y, exact_state) = ssd_step(**inputs), exact_step(**inputs)
    assert (y.dtype, state.dtype) == (inputs["x"].dtype, inputs["state"].dtype)
    assert relative_error(y, exact_y) <= TOLERANCE[y.dtype]
    assert relative_error(state, exact_state) <= TOLERANCE[state.dtype]


def walk(inputs: Inputs, start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Steps over tokens [start, stop) of a scan's inputs: y [B, tokens, H, P], the last state."""
    outputs = []
    for t in range(start, stop):
        token = {name: inputs[name][:, t] for name in TOKEN}
        y, state = ssd_step(state, **token, **{name: inputs[name] for name in FIXED})
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
