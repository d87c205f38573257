"""Printing tables for people and for pipes."""

import sys

from rich.console import Console

PIPE_WIDTH = 4096


def whole_console() -> Console:
    """Abbreviates nothing: long values fold on a terminal, and keep their line elsewhere."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(highlight=False, markup=False, width=width)
