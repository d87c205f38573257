"""Printing tables for people and for pipes, and lines of logs; places that a command writes to."""

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from untrusted.errors import UnsafeNameError
from untrusted.names import check_local
from untrusted.numbers import counted, number
from untrusted.paths import expand_path
from untrusted.secrets import redact_message
from untrusted.text import printable, printable_lines

PIPE_WIDTH = 4096  # no table reaches it, since its cells fold
CELL_WIDTH = 100  # columns of a cell where no terminal sets a width
LONGEST_LIST = 8  # entries that are printed one by one


def whole_console() -> Console:
    """Return a console that abbreviates nothing: cells fold at the width of the terminal or, in
    pipes and files, at CELL_WIDTH; columns with no_wrap, of paths, stay whole there."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return SafeConsole(highlight=False, markup=False, width=width)


def shown(text: str) -> str:
    """Text for a terminal or log: without credentials in URLs, controls spelled out."""
    return printable_lines(redact_message(text))


def print_fields(fields: dict[str, Any]) -> None:
    """Print names and values: folded on a terminal, else a value a line, as wide as it is."""
    texts = {name: _in_words(value) for name, value in fields.items()}
    if sys.stdout.isatty():
        table = Table("name", Column(overflow="fold"), show_header=False, box=None)
        for name, text in texts.items():
            table.add_row(name, text, style="")
        whole_console().print(table)
        return
    width = max(map(len, texts), default=0)
    for name, text in texts.items():
        say(f"{name:{width}}  {text}".replace("\n", "\n" + " " * (width + 2)).rstrip())


def _in_words(value: Any) -> str:
    if isinstance(value, str):
        return value
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return number(value, 5) if plain else json.dumps(value)


def flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with those of inner objects under dotted names, and of long lists the count."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, list) and len(value) > LONGEST_LIST:
            found[name] = counted(len(value), "entry", "entries")
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            found |= flat({f"{name}.{index}": entry for index, entry in enumerate(value)})
        elif isinstance(value, dict) and value:
            found |= flat({f"{name}.{inner}": entry for inner, entry in value.items()})
        else:
            found[name] = value
    return found


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
    """Refuse a URL as the place of what a command writes: the callback of such an argument.

    Returns the place, `~` expanded as by `expanded`.
    """
    if path is None:
        return None
    try:
        check_local(path, "it")
    except UnsafeNameError as error:
        raise typer.BadParameter(str(error)) from error
    return Path(expanded(str(path)))


def expanded(path: str) -> str:
    """Expand `~` and variables in the place of what a command writes: shells leave those of
    `--out=~/x` as they are. A callback, too."""
    try:
        return expand_path(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


class SafeConsole(Console):
    """Prints every text, also those in tables, by way of `shown`; see `whole_console`."""

    def print(self, *objects: Any, **options: Any) -> None:
        """See Console."""
        for table in objects:
            for column in table.columns if isinstance(table, Table) else ():
                if not column.no_wrap and not self.is_terminal:
                    column.max_width = CELL_WIDTH
                column.no_wrap = column.no_wrap and not self.is_terminal
                column.overflow = "fold"
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """See Console."""
        return super().render_str(shown(text), **options)


class LogFormatter(logging.Formatter):
    """Formats records by way of `shown`."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return shown(super().format(record))
