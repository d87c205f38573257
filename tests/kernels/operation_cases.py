"""An operation beside its float64 oracle, on the same inputs: outputs and every gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels.scan_cases import relative_error

# of what is computed in float32 and rounded once or twice
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
DTYPES = list(TOLERANCE)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers for every dtype, up to rounding."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def outputs_and_gradients(operation: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """All outputs, then the gradient of each input under the same random output gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    result = operation(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    grads = [normal(*y.shape, dtype=inputs[0].dtype, seed=7 + i) for i, y in enumerate(outputs)]
    given = [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, given))


def assert_matches(
    operation: Callable[..., Any], oracle: Callable[..., Any], inputs: Sequence[Tensor]
) -> None:
    """Within rounding, in shapes and dtypes of the inputs."""
    found = outputs_and_gradients(operation, inputs)
    expected = outputs_and_gradients(oracle, inputs)
    errors = [relative_error(f, e) for f, e in zip(found, expected, strict=True)]
    assert all(f.dtype == inputs[0].dtype for f in found)
    assert all(f.shape == e.shape for f, e in zip(found, expected, strict=True))
    assert all(error <= TOLERANCE[inputs[0].dtype] for error in errors), errors


def assert_repeatable(operation: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Two runs, equal to the last bit."""
    first, second = (outputs_and_gradients(operation, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def side_by_side(tensors: Sequence[Tensor], rest: int = 0) -> list[Tensor]:
    """The same numbers as adjacent columns of one buffer, `rest` more at the end of its rows."""
    flat = [t.flatten(2) if t.ndim > 2 else t.unsqueeze(-1) for t in tensors]
    buffer = torch.cat((*flat, flat[0].new_zeros(*flat[0].shape[:2], rest)), dim=-1)
    parts = buffer.split([*(t.shape[-1] for t in flat), rest], dim=-1)
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=False)]
