"""--help shows every word that the program has written for it."""

from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from pretrain.cli import app

FOREIGN = ("kernels bench", "kernels tune")  # argparse prints their help


def commands(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    """Every command below `command`, hidden ones too, by the words that call it."""
    yield " ".join(words), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


COMMANDS = dict(commands(typer.main.get_command(app), ()))


def letters(text: str) -> str:
    """Return the text without spaces and frames."""
    return "".join(letter for letter in text if not letter.isspace() and letter not in "│╭╮╰╯─")


@pytest.mark.parametrize("words", [words for words in COMMANDS if words not in FOREIGN])
def test_help_loses_nothing(words: str) -> None:
    """Square brackets, above all, which are markup to the library that prints it."""
    command = COMMANDS[words]
    result = CliRunner().invoke(app, [*words.split(), "--help"], env={"COLUMNS": "1000"})
    assert result.exit_code == 0, result.output
    shown = letters(result.stdout)
    assert letters(command.help or "") in shown
    for param in command.params:
        assert letters(getattr(param, "help", None) or "") in shown
        default = getattr(param, "show_default", None)
        if isinstance(default, str):
            assert letters(f"[default: ({default})]") in shown
    for inner in getattr(command, "commands", {}).values():
        assert inner.hidden or letters(inner.get_short_help_str(10_000)).rstrip(".") in shown
