"""The Triton cross entropy against its float64 oracle and beside Megatron-core's."""

import pytest
import torch

from kernels.cross_entropy import fused
from kernels.cross_entropy.cross_entropy import cross_entropy_
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


@pytest.fixture(params=[64, 512], ids=lambda block: f"block{block}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Several blocks a row, and one."""
    monkeypatch.setattr(fused, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_naive(size: tuple[int, int], dtype: torch.dtype, block: int) -> None:
    given = inputs(*size, dtype)
    assert_no_worse_than_megatron(run(*given, size[1]), *given, size[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_logits_of_any_size(scale: float, dtype: torch.dtype, block: int) -> None:
    given = inputs(300, 257, dtype, scale=scale)
    assert_no_worse_than_megatron(run(*given, 257), *given, 257)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ranks", "valid"), [(2, 300), (2, 293), (4, 257), (4, 120)])
def test_ranks_agree_with_one(ranks: int, valid: int, dtype: torch.dtype, block: int) -> None:
    """Also where the last ranks have padding alone; labels are on the first and on others."""
    given = inputs(300, valid, dtype, rows=20)
    found = run_split(fused, ranks, *given, valid)
    assert_no_worse_than_megatron(found, *given, valid)
    far = (given[0] * 3000).to(dtype), *given[1:]
    assert_no_worse_than_megatron(run_split(fused, ranks, *far, valid), *far, valid)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_z_loss_is_in_the_gradient_alone(dtype: torch.dtype, ranks: int, block: int) -> None:
    given = inputs(300, 257, dtype)
    z_loss = 0.01
    split = run(*given, 257, z_loss) if ranks == 1 else run_split(fused, ranks, *given, 257, z_loss)
    expected, plain = oracle(*given, 257, z_loss), oracle(*given, 257)
    assert torch.equal(split[0], run(*given, 257)[0]) or ranks > 1
    torch.testing.assert_close(split[0].double(), plain[0], rtol=1e-6, atol=1e-6)
    assert worst(split[2], expected[2]) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert worst(split[2], plain[2]) > 0.05


def test_masked_tokens_have_no_loss_and_no_gradient(block: int) -> None:
    logits, labels, _ = inputs(100, 93, torch.bfloat16)
    loss, missed, gradient = run(logits, labels, torch.zeros(9), 93, 1e-3)
    assert not torch.stack((loss, missed)).any()
    assert not gradient.any()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_numbers_that_are_not_finite_are_not_hidden_by_the_mask(ranks: int, block: int) -> None:
    given = broken_rows()
    found = run(*given, 93) if ranks == 1 else run_split(fused, ranks, *given, 93)
    assert_broken_rows_are_seen(found)


def test_evaluation_leaves_the_logits_and_has_the_same_loss(block: int) -> None:
    logits, labels, weights = inputs(300, 257, torch.bfloat16)
    kept, out = logits.clone(), (torch.empty_like(weights), torch.empty_like(weights))
    cross_entropy_(logits, labels, weights, valid=257, out=out, gradient=False)
    assert torch.equal(kept, logits)
    for found, expected in zip(out, run(logits, labels, weights, 257)[:2], strict=True):
        assert torch.equal(found, expected)


def test_rows_apart_keep_what_is_between_them(block: int) -> None:
    logits, labels, weights = inputs(100, 93)
    wide = torch.full((9, 130), 7.0)
    wide[:, :100] = logits
    out = torch.empty_like(weights), torch.empty_like(weights)
    cross_entropy_(wide[:, :100], labels, weights, valid=93, out=out)
    assert torch.equal(wide[:, :100], run(logits, labels, weights, 93)[2])
    assert bool((wide[:, 100:] == 7).all())


def test_a_gradient_repeats_to_the_bit(block: int) -> None:
    given = inputs(300, 257, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(*given, 257), run(*given, 257), strict=True))


def test_float64_is_refused_in_strict_mode() -> None:
    with pytest.raises(ValueError, match="not float64"):
        run(*inputs(7, 7, torch.float64), 7)
