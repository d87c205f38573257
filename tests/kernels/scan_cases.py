"""Inputs of the scan tests, and every output and gradient of a scan on them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.rope.table import rotary_cos_sin

Inputs = dict[str, Any]
DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "dt_bias", "D", "initial_state")


def make_inputs(
    batch: int,
    length: int,
    heads: int = 4,
    head_dim: int = 16,
    state_dim: int = 16,
    groups: int | None = None,
    dtype: torch.dtype = torch.float32,
    documents: Sequence[int] = (),
    A: Sequence[float] | None = None,
    seed: int = 0,
    exact: torch.dtype = torch.float32,
) -> Inputs:
    """`documents` are borders inside a row, the same in every row; A defaults to -1 .. -16."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    groups = groups or heads
    borders = sorted({0, *documents})
    decays = torch.tensor(A, dtype=exact) if A else -torch.logspace(0, 1.2, heads, dtype=exact)
    starts = torch.tensor(borders)
    position = torch.arange(length)
    position = position - starts[torch.bucketize(position, starts, right=True) - 1]
    cos, sin = rotary_cos_sin(position.expand(batch, length), state_dim, 10000.0, {})
    rows = [row * length + border for row in range(batch) for border in borders]
    return {
        "x": normal(batch, length, heads, head_dim).to(dtype),
        "dt": normal(batch, length, heads).to(exact),
        "A": decays,
        "B": normal(batch, length, groups, state_dim).to(dtype),
        "C": normal(batch, length, groups, state_dim).to(dtype),
        "cos": cos,
        "sin": sin,
        "dt_bias": (normal(heads) - 4).to(exact),
        "cu_seqlens": torch.tensor([*rows, batch * length], dtype=torch.int32),
        "initial_state": normal(batch, heads, head_dim, state_dim).to(exact),
        "D": normal(heads).to(exact),
    }


def run(
    scan: Callable[..., Any], inputs: Inputs, chunk_size: int = 0, seed: int = 1
) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every differentiable input under random dy, dS."""
    leaves = {
        name: value.detach().clone().requires_grad_(name in DIFFERENTIABLE)
        for name, value in inputs.items()
        if value is not None
    }
    y, state = scan(**leaves, chunk_size=chunk_size, output_final_state=True)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    d_y = torch.randn(y.shape, generator=generator).to(inputs["x"].dtype).to(y.dtype)
    d_state = torch.randn(state.shape, generator=generator).to(state.dtype)
    wanted = [name for name in DIFFERENTIABLE if name in leaves]
    grads = torch.autograd.grad([y, state], [leaves[n] for n in wanted], [d_y, d_state])
    result = {"y": y.detach(), "final_state": state.detach()}
    result |= {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    if "A" in leaves:  # models train the logarithm of -A
        result["d_A_log"] = result.pop("d_A") * inputs["A"]
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what was expected."""
    scale = expected.double().norm().clamp(min=1e-30)
    return ((found.double() - expected.double()).norm() / scale).item()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative errors within `tolerance`.

    d_A_log and d_dt_bias are sums over all tokens of terms of both signs, which may all but cancel:
    they are measured against the norm of d_dt, where that is larger. d_A_log is within 10 times
    `tolerance` of its own norm as well.
    """
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert errors.get("d_A_log", 0.0) <= 10 * tolerance, errors
    for name in ("d_A_log", "d_dt_bias"):
        if name in expected:
            sums, terms = expected[name].double().norm(), expected["d_dt"].double().norm()
            errors[name] *= (sums / torch.maximum(sums, terms)).item()
    assert all(error <= tolerance for error in errors.values()), errors
