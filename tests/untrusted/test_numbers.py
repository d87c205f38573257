"""Numbers in messages and tables."""

import math

import pytest

from untrusted.numbers import counted, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (12288, "12,288"), (-1234567, "-1,234,567"), (10**12, "1,000,000,000,000"),
        (5.476977155543864, "5.477"), (952.9158823237011, "952.9"), (12345.678, "12,346"),
        (0.0, "0"), (9.9999, "10.00"), (999.96, "1,000"), (-0.5, "-0.5000"),
        (0.000345678, "0.0003457"), (1e-7, "1e-07"), (1.23456e12, "1.235e+12"), (1e308, "1e+308"),
        (math.nan, "nan"), (-math.inf, "-inf"), (None, "none"),
    ],
)  # fmt: skip
def test_numbers_are_short_and_grouped(value: float | None, text: str) -> None:
    assert number(value) == text


def test_digits_are_significant_ones() -> None:
    assert number(5.476977, 5) == "5.4770"
    assert number(12.0, 2) == "12"


def test_one_of_a_thing_is_not_many() -> None:
    assert [counted(n, "rank") for n in (0, 1, 2, 1024)] == [
        "0 ranks", "1 rank", "2 ranks", "1,024 ranks",
    ]  # fmt: skip
    assert counted(2, "copy", "copies") == "2 copies"
