"""Checks of arguments that run once for each shape."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import checks
from kernels.checks import once_per_shape


def counting() -> tuple[list[Tensor | None], Callable[..., None]]:
    """What a check was called with, and the check."""
    calls: list[Tensor | None] = []

    @once_per_shape
    def check(tensor: Tensor | None, number: int = 0) -> None:
        calls.append(tensor)
        if tensor is not None and tensor.ndim == 3:
            raise ValueError("three dimensions")

    return calls, check


def test_the_same_shape_is_checked_once() -> None:
    calls, check = counting()
    for _ in range(3):
        check(torch.zeros(4, 6), 1)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(6, 4), 1),
        (torch.zeros(6, 4).t(), 1),  # other strides
        (torch.zeros(4, 6, dtype=torch.float64), 1),
        (torch.zeros(4, 6, device="meta"), 1),
        (torch.zeros(4, 6), 2),
        (None, 1),
    ],
    ids=["shape", "strides", "dtype", "device", "value", "absent"],
)
def test_whatever_a_check_may_read_makes_it_run_again(other: tuple[Tensor | None, int]) -> None:
    calls, check = counting()
    check(torch.zeros(4, 6), 1)
    check(*other)
    assert len(calls) == 2


def test_what_failed_fails_again() -> None:
    calls, check = counting()
    for _ in range(2):
        with pytest.raises(ValueError, match="three dimensions"):
            check(torch.zeros(1, 2, 3))
    assert len(calls) == 2


def test_no_more_than_some_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "REMEMBERED", 2)
    calls, check = counting()
    for size in (1, 2, 3, 3, 1):
        check(torch.zeros(size))
    assert len(calls) == 4  # the third made room for itself, the last came again
