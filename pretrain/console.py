"""Printing tables for people and for pipes, and lines of logs; places that a command writes to."""

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from untrusted.errors import UnsafeNameError
from untrusted.names import check_local
from untrusted.secrets import redact_message
from untrusted.text import printable, printable_lines

PIPE_WIDTH = 4096


def whole_console() -> Console:
    """Abbreviates nothing: long values fold on a terminal, and keep their line elsewhere."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return SafeConsole(highlight=False, markup=False, width=width)


def shown(text: str) -> str:
    """Text for a terminal or log: without credentials in URLs, controls spelled out."""
    return printable_lines(redact_message(text))


def literal(label: str) -> str:
    """A label of a picture, which matplotlib draws as it is: no formula, no controls."""
    return printable(redact_message(label)).replace("$", r"\$")


def say(text: str) -> None:
    """Print a line by way of `shown`."""
    print(shown(text))


def warn(text: str) -> None:
    """Print a warning to standard error by way of `shown`."""
    # a command that can go on without what it warns of can go on without the warning, too
    with contextlib.suppress(OSError):
        print(f"warning: {shown(text)}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print one JSON value by way of `shown`."""
    print(shown(json.dumps(value)))


def local(path: Path | None) -> Path | None:
    """Refuse a URL as the place of what a command writes: the callback of such an argument."""
    if path is not None:
        try:
            check_local(path, "it")
        except UnsafeNameError as error:
            raise typer.BadParameter(str(error)) from error
    return path


class SafeConsole(Console):
    """Prints every text, also those in tables, by way of `shown`."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See Console."""
        return super().render_str(shown(text), **options)


class LogFormatter(logging.Formatter):
    """Formats records by way of `shown`."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return shown(super().format(record))
