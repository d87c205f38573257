"""Numbers as people read them, in every message and table of the program."""

import math

LARGE = 1e9  # from which a measured value is written with an exponent
SMALL = 1e-3  # below which it is


def number(value: float | None, digits: int = 4) -> str:
    """Return a count in full (12,288), a measured value with `digits` significant digits (5.477).

    "none" for None; NaN and infinities by their names.
    """
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    size = abs(float(f"{value:.{digits - 1}e}"))  # as rounded, which may reach the next power of 10
    if not SMALL <= size < LARGE:
        return f"{value:.{digits}g}"
    whole = math.floor(math.log10(size)) + 1
    return f"{value:,.{max(0, digits - whole)}f}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return "1 rank", "2 ranks", "1,024 ranks"; plural: the noun's, unless it is noun + s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
