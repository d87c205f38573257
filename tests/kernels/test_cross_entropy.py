"""The cross entropy in torch against its float64 oracle and beside Megatron-core's, on the CPU."""

import pytest
import torch

from kernels.cross_entropy import blocked, sizes
from kernels.cross_entropy.cross_entropy import cross_entropy_
from kernels.cross_entropy.naive import cross_entropy_naive
from tests.kernels.cross_entropy_cases import (
    SIZES,
    assert_broken_rows_are_seen,
    assert_no_worse_than_megatron,
    broken_rows,
    inputs,
    oracle,
    run,
    run_split,
    worst,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=[500, 1 << 18], ids=lambda elements: f"block{elements}")
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some rows, and of all."""
    monkeypatch.setattr(sizes, "CPU_ELEMENTS", request.param)


@pytest.mark.parametrize("choice", ["torch", "naive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_naive(size, dtype, choice, monkeypatch):
    monkeypatch.setenv("TRANSXSSM_KERNELS", choice)
    given = inputs(*size, dtype)
    assert_no_worse_than_megatron(run(*given, size[1]), *given, size[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_logits_of_any_size(scale, dtype):
    given = inputs(300, 257, dtype, scale=scale)
    assert_no_worse_than_megatron(run(*given, 257), *given, 257)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ranks", "valid"), [(2, 300), (2, 293), (4, 257), (4, 120)])
def test_ranks_agree_with_one(ranks, valid, dtype):
    given = inputs(300, valid, dtype, rows=20)
    assert_no_worse_than_megatron(run_split(blocked, ranks, *given, valid), *given, valid)


def test_float64_is_computed_in_float64():
    given = inputs(300, 257, torch.float64)
    expected = oracle(*given, 257, 0.1)
    assert worst(run(*given, 257, 0.1)[2], expected[2]) < 1e-13
    assert worst(run_split(blocked, 4, *given, 257, 0.1)[2], expected[2]) < 1e-13


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_z_loss_is_in_the_gradient_alone(dtype, ranks):
    given = (*inputs(300, 257, dtype), 257)
    found = run(*given, 0.01) if ranks == 1 else run_split(blocked, ranks, *given, 0.01)
    expected, plain = oracle(*given, 0.01), oracle(*given)
    torch.testing.assert_close(found[0].double(), plain[0], rtol=1e-6, atol=1e-6)
    assert worst(found[2], expected[2]) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert worst(found[2], plain[2]) > 0.05


def test_oracle_is_the_cross_entropy():
    logits, labels, weights = inputs(300, 300, torch.float64)
    x = logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, labels, reduction="none") * weights
    objective = loss + 0.1 * torch.exp(x).sum(1).log() ** 2 * weights
    found = cross_entropy_naive(logits, labels, weights, 0.1)
    torch.testing.assert_close(found[0], loss.detach())
    torch.testing.assert_close(found[2], torch.autograd.grad(objective.sum(), x)[0])
    torch.testing.assert_close(found[1], (logits.argmax(1) != labels) * weights.double())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_numbers_that_are_not_finite_are_not_hidden_by_the_mask(ranks):
    given = broken_rows()
    assert_broken_rows_are_seen(
        run(*given, 93) if ranks == 1 else run_split(blocked, ranks, *given, 93)
    )


def test_evaluation_leaves_the_logits_and_has_the_same_loss():
    for dtype in DTYPES:
        logits, labels, weights = inputs(300, 257, dtype)
        kept, out = logits.clone(), (torch.empty_like(weights), torch.empty_like(weights))
        cross_entropy_(logits, labels, weights, valid=257, out=out, gradient=False)
        assert torch.equal(kept, logits)
        for found, expected in zip(out, run(logits, labels, weights, 257)[:2], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"logits": torch.zeros(3, 8).int()}, TypeError, "logits has dtype torch.int32"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits have shape \(3,\); expected \[T, V\]"),
        ({"logits": torch.zeros(8, 3).T}, ValueError, "their rows must be contiguous"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"labels has shape \(4,\); expected"),
        ({"labels": torch.zeros(3).int()}, TypeError, "labels has dtype torch.int32"),
        ({"weights": torch.zeros(3).half()}, TypeError, "weights has dtype torch.float16"),
        ({"weights": torch.zeros(3, device="meta")}, ValueError, "weights is on meta"),
        ({"out": (torch.zeros(3), torch.zeros(2))}, ValueError, r"out\[1\] has shape \(2,\)"),
    ],
)
def test_bad_input_is_named(change, error, says):
    given = {
        "logits": torch.zeros(3, 8), "labels": torch.zeros(3).long(), "weights": torch.zeros(3),
        "out": (torch.zeros(3), torch.zeros(3)),
    }  # fmt: skip
    with pytest.raises(error, match=says):
        cross_entropy_(**(given | change), valid=8)
