"""Sizes that the memory model counts, too. Imports no torch."""

# 1 MiB of float32: larger leaves a CPU's cache, smaller pays for calls
CPU_ELEMENTS = 1 << 18
# elsewhere calls cost more than passes, and a float32 copy of all logits more memory than there is
DEVICE_ELEMENTS = 1 << 26


def rows_at_once(columns: int, on_cpu: bool) -> int:
    """Tokens of which torch has float32 exponentials at once, over so many columns."""
    return max(1, (CPU_ELEMENTS if on_cpu else DEVICE_ELEMENTS) // columns)
