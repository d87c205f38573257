"""RMSNorm and the weighted residual beside their oracles, by name, with eps filled in."""

import torch
from torch import Tensor

from kernels.norm.naive import rms_norm_naive, weighted_residual_naive
from kernels.norm.norm import add_rms_norm, branch_rms_norm, rms_norm, weighted_residual
from tests.kernels.operation_cases import assert_matches, normal

EPS = 1e-6


def _add_rms_norm_naive(
    h: Tensor, update: Tensor, residual_weight: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    new_h = weighted_residual_naive(h, update, residual_weight)
    return new_h, rms_norm_naive(new_h, norm_weight, EPS)


def _branch_naive(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return h, rms_norm_naive(h, weight, EPS)


# operation, oracle, how many tensors [..., N] and how many weights [N] they take
OPERATIONS = {
    "norm": (lambda *t: rms_norm(*t, EPS), lambda *t: rms_norm_naive(*t, EPS), 1, 1),
    "branch": (lambda *t: branch_rms_norm(*t, EPS), _branch_naive, 1, 1),
    "residual": (weighted_residual, weighted_residual_naive, 2, 1),
    "both": (lambda *t: add_rms_norm(*t, EPS), _add_rms_norm_naive, 2, 2),
}


def inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    _, _, tensors, weights = OPERATIONS[name]
    shapes = [shape] * tensors + [shape[-1:]] * weights
    return [normal(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]


def assert_small_rows_feel_eps(name: str) -> None:
    """Of rows whose mean square is as large as eps."""
    *given, weight = inputs(name, (7, 40))
    assert_matches(*OPERATIONS[name][:2], [*(t * EPS**0.5 for t in given), weight])


def assert_statistics_are_of_the_result(dtype: torch.dtype) -> None:
    """The norm in one launch is that of the sum as it is returned, rounded to its dtype."""
    new_h, u = OPERATIONS["both"][0](*inputs("both", (9, 40), dtype))
    weight = inputs("both", (9, 40), dtype)[-1]
    assert torch.equal(u, rms_norm(new_h, weight, EPS))


def assert_one_output_is_enough(name: str, read: int) -> None:
    """Gradients of one output alone, of operations that have two, are those of the oracle."""
    operation, oracle = OPERATIONS[name][:2]

    def expected(*given: Tensor) -> Tensor:
        outputs = oracle(*given)
        return outputs[read] + 0 * outputs[1 - read]  # every input has a gradient

    assert_matches(lambda *t: operation(*t)[read], expected, inputs(name, (9, 40)))
