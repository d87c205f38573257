"""Seconds of benchmarks.fuzz, in this process: wild configurations, and damaged files.

Every refusal is one of the product's own errors, whatever the number of the example.
"""

import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from benchmarks import fuzz_folder
from benchmarks.damage import toml
from benchmarks.fuzz_cases import damage, make_outside, trespass
from benchmarks.fuzz_commands import COMMANDS, Command
from benchmarks.fuzz_configs import wild_config
from benchmarks.ranks import run_ranks
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.single_gpu import ModelError
from data_pipeline.errors import DataError
from pretrain.cli import _exhausted, app
from pretrain.config import ConfigError
from slurm.jobs import SlurmError
from untrusted.errors import UntrustedError
from untrusted.text import without_controls

READERS = [
    "status", "status --json", "runs", "cancel", "bad-nodes", "submit --dry-run",
    "checkpoint list", "checkpoint inspect", "checkpoint verify", "checkpoint verify --deep",
    "checkpoint diff", "data inspect", "data verify", "tokenizer inspect", "generate",
    "checkpoint import",
]  # fmt: skip
OWN_ERRORS = (
    ConfigError, CheckpointError, DataError, SlurmError, UntrustedError, ModelError, SystemExit,
)  # fmt: skip
LIMIT_SECONDS = 20.0
choices = st.integers(0, 2**32 - 1).map(random.Random)
seconds_of_it = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


class HangError(BaseException):
    """Not an Exception, which the product may catch."""


@contextmanager
def no_hang() -> Iterator[None]:
    """Raise HangError after LIMIT_SECONDS."""

    def end(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(words: str) -> Result:
    """A command in this process, which ends by itself or with an error of the product's own."""
    with no_hang():
        result = CliRunner().invoke(app, words.split(), env={"NO_COLOR": "1", "COLUMNS": "200"})
    error = result.exception
    known = error is None or isinstance(error, OWN_ERRORS) or (
        isinstance(error, Exception) and _exhausted(error) is not None
    )  # fmt: skip
    if not known:
        assert error is not None
        raise error
    assert without_controls(result.output) == result.output
    return result


@seconds_of_it
@given(choice=choices)
def test_wild_configurations_are_used_or_refused(choice: random.Random, tmp_path: Path) -> None:
    tree, _ = wild_config(choice, fuzz_folder.TREE)
    path = tmp_path / "wild.toml"
    try:
        path.write_bytes(toml(tree))
    except (TypeError, ValueError):  # no TOML can say it
        return
    run(f"estimate {path}")


def prepared(folder: Path) -> None:
    fuzz_folder.prepare(folder, fuzz_folder.SHORT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    run_ranks(1, prepared, folder)
    return folder


@seconds_of_it
@given(name=st.sampled_from(READERS), choice=choices)
def test_damaged_files_are_skipped_or_refused(
    name: str, choice: random.Random, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    fuzz_folder.copy(base, folder)
    outside = make_outside(folder)
    monkeypatch.chdir(folder / "work")
    monkeypatch.setenv("PATH", f"{folder / 'work/bin'}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(folder / "home"))
    command: Command = COMMANDS[name]
    damage(choice, command, outside)
    (folder / "output").touch()
    run(command.words)
    assert trespass(folder, outside, set()) == ""
