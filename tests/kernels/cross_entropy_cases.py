"""Cross entropy of logits of many kinds, its float64 oracle, and what Megatron-core makes of it."""

from types import ModuleType

import torch
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch import Tensor

from kernels.cross_entropy.cross_entropy import cross_entropy_
from kernels.cross_entropy.naive import cross_entropy_naive

# rows of logits, and those of them that are tokens
SIZES = [(1, 1), (7, 7), (64, 64), (100, 93), (128, 65), (300, 257)]
Results = tuple[Tensor, Tensor, Tensor]  # loss and missed [T], gradient [T, V]


def inputs(
    columns: int, valid: int, dtype: torch.dtype = torch.float32, *, rows: int = 9, scale: float = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, with numbers in the padding too; labels: first, last, likeliest, others; weights."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(columns)
    logits = (scale * torch.randn(rows, columns, generator=generator)).to(dtype)
    labels = torch.randint(valid, (rows,), generator=generator)
    labels[0], labels[1 % rows], labels[2 % rows] = 0, valid - 1, logits[2 % rows, :valid].argmax()
    weights = torch.rand(rows, generator=generator)
    weights[3 % rows], weights[4 % rows] = 1, 0
    return logits, labels, weights


def run(
    logits: Tensor, labels: Tensor, weights: Tensor, valid: int, z_loss: float = 0.0
) -> Results:
    """`cross_entropy_` of a copy."""
    x = logits.clone()
    out = torch.empty_like(weights), torch.empty_like(weights)
    cross_entropy_(x, labels, weights, valid=valid, out=out, z_loss=z_loss)
    return *out, x


def run_split(
    implementation: ModuleType,
    ranks: int,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    valid: int,
    z_loss: float = 0.0,
) -> Results:
    """On so many ranks, one after the other, with a gather between the two launches."""
    parts = [part.clone() for part in logits.chunk(ranks, 1)]
    columns = parts[0].shape[1]
    firsts = [rank * columns for rank in range(ranks)]
    where = [(first, min(max(valid - first, 0), columns)) for first in firsts]
    statistics = torch.stack(
        [implementation.statistics(x, labels, *at) for x, at in zip(parts, where, strict=True)]
    )
    found = []
    for x, at in zip(parts, where, strict=True):
        out = torch.empty_like(weights), torch.empty_like(weights)
        implementation.finish(
            x, labels, weights, statistics, out, *at, ranks * columns, z_loss, True
        )
        found.append(out)
    for out in found[1:]:  # the same on every rank, to the bit
        torch.testing.assert_close(out, found[0], rtol=0, atol=0, equal_nan=True)
    return *found[0], torch.cat(parts, 1)


def broken_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Of 93 tokens, a row each with much of -inf, with +inf, with NaN and of -inf alone, masked; a
    label that is no token, masked; and a label at -inf, which counts."""
    logits, labels, weights = inputs(100, 93)
    logits[0, :70] = logits[1, 5] = float("-inf")
    labels[0], labels[1] = 80, 4
    logits[2, 80], logits[3, 5], logits[4] = float("inf"), float("nan"), float("-inf")
    weights[:6], labels[5] = 0, -100
    logits[6, 9], labels[6], weights[6] = float("-inf"), 9, 1
    return logits, labels, weights


def assert_broken_rows_are_seen(found: Results) -> None:
    """As Megatron-core has it, times the mask: a NaN stays one, so that the step is left out."""
    loss, gradient = megatron(*broken_rows(), 93)
    torch.testing.assert_close(found[0], loss, equal_nan=True)
    torch.testing.assert_close(found[2][:, :93], gradient[:, :93], equal_nan=True)
    assert loss[:7].isnan().tolist() == [False, False, True, True, True, False, False]
    assert loss[6] == float("inf")
    assert found[1][5] == 0


def oracle(
    logits: Tensor, labels: Tensor, weights: Tensor, valid: int, z_loss: float = 0.0
) -> Results:
    """Float64, and 0 in the padding."""
    loss, missed, gradient = cross_entropy_naive(logits[:, :valid], labels, weights, z_loss)
    return loss, missed, torch.nn.functional.pad(gradient, (0, logits.shape[1] - valid))


def megatron(logits: Tensor, labels: Tensor, weights: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient by Megatron-core's operations in its order, as one rank runs them on
    float32 logits with -inf in the padding; the gradient in the logits' dtype."""
    core, x = VocabParallelCrossEntropy, logits.float().clone()[:, None]  # [T, 1, V]
    x[..., valid:] = float("-inf")
    x, largest = core.calculate_logits_max(x)
    elsewhere, at, of_label, total, x = core.calculate_predicted_logits(
        x, labels[:, None], largest, 0, logits.shape[1]
    )
    softmax, loss = core.calculate_cross_entropy_loss(x, of_label, total)
    flat, row, update, softmax = core.prepare_gradient_calculation_operands(softmax, elsewhere)
    gradient = core.calculate_gradients(flat, row, at, update, softmax, weights[:, None])
    return loss[:, 0] * weights, gradient[:, 0].to(logits.dtype)


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference of a token, relative to that token's norm or 1e-3."""
    found, expected = found.double().flatten(1), expected.flatten(1)
    size = expected.norm(dim=1).clamp(min=1e-3)
    return float(((found - expected).norm(dim=1) / size).max())


def assert_no_worse_than_megatron(
    found: Results, logits: Tensor, labels: Tensor, weights: Tensor, valid: int
) -> None:
    """Against float64, loss and gradient have at most Megatron's error, or a rounding more."""
    expected = oracle(logits, labels, weights, valid)
    loss, gradient = megatron(logits, labels, weights, valid)
    rounding = 4 * torch.finfo(torch.float32).eps
    assert torch.equal(found[1].double(), expected[1])
    for mine, other, exact in ((found[0], loss, expected[0]), (found[2], gradient, expected[2])):
        mine, other, exact = (t.view(t.shape[0], -1) for t in (mine, other, exact))
        assert worst(mine, exact) <= 1.05 * worst(other, exact) + rounding
    assert found[0].dtype == torch.float32
    assert found[2].dtype == logits.dtype
    assert not found[2][:, valid:].any()
