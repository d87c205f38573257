"""The run directory: the record of a run, and the logs of its ranks.

config.toml, environment.json, metrics.jsonl, events.jsonl, checkpoints.json, tensorboard/,
logs/rank-N.log, checkpoints/.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from rich.logging import RichHandler

from pretrain import failure, run_lock
from pretrain.bad_steps import EVENTS
from pretrain.config import Config, ConfigError
from pretrain.console import LogFormatter
from pretrain.credentials import dump_recorded
from pretrain.records import read_starts
from pretrain.starts import record_began
from untrusted.errors import UntrustedError
from untrusted.files import check_place, write_durably
from untrusted.numbers import counted
from untrusted.secrets import redact_arguments

log = logging.getLogger("transxssm")

METRICS = "metrics.jsonl"


def lock_run(run_dir: Path) -> None:
    """Make this job the only one that writes into the run directory. Rank 0 only.

    Raises ConfigError where another one does, or the run directory cannot be written; nothing in it
    has been changed then.
    """
    with _writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        run_lock.hold(run_dir)


def check_run(run_dir: Path) -> None:
    """Raise ConfigError when `run_dir` is no run directory."""
    if not (run_dir / "config.toml").exists():
        near = Path("runs") / run_dir
        hint = f"; there is one in {near}" if (near / "config.toml").exists() else ""
        raise ConfigError(f"{run_dir}: no run directory, there is no config.toml{hint}")


def start_log(run_dir: Path, rank: int) -> None:
    """Begin, or go on with, this rank's log file; rank 0 also reports on the console.

    The file is first written to by `begin_log`, or with an error.
    Raises ConfigError when the run directory cannot be written.
    """
    with _writing(run_dir):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        check_place(run_dir / "logs" / f"rank-{rank}.log")
        _add_handlers(run_dir / "logs" / f"rank-{rank}.log", console=rank == 0)


def record_start(
    config: Config, world_size: int, step: int = 0, continued: Config | None = None
) -> None:
    """Record configuration, environment and the start itself, once the run is known to begin after
    `step`. Rank 0 only.

    continued: the configuration with the phases that the run has had, where it goes on.

    Raises ConfigError when the run directory cannot be written, UnsafeFileError for a folder or
    device in the place of a file of its record.
    """
    run_dir = Path(config.logging.run_dir)
    for name in (METRICS, EVENTS):
        check_place(run_dir / name)
    with _writing(run_dir):
        (run_dir / "logs" / failure.FILE).unlink(missing_ok=True)  # of an earlier start
        write_durably(run_dir / "config.toml", dump_recorded(config).encode())
        _record_environment(run_dir / "environment.json", world_size)
    whole = continued or config
    record_began(
        run_dir, step, began_message(step, world_size, git_revision()),
        total_steps=whole.total_steps, total_tokens=whole.total_tokens,
    )  # fmt: skip


def began_message(step: int, world_size: int, revision: str) -> str:
    """Return the text of a start's event."""
    return f"begins after step {step} on {counted(world_size, 'rank')}, {revision or 'no revision'}"


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"logging.run_dir={run_dir} cannot be written ({error}); free space or mend "
            "permissions there, or choose another"
        ) from error


class _HeldFile(logging.FileHandler):
    """A log file that is not written to before the run is known to begin, or fails: a start that
    finds nothing to do changes no file."""

    held: list[logging.LogRecord] | None

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or keep it."""
        if self.held is not None and record.levelname != "ERROR":
            self.held.append(record)
            return
        self.write_held()
        super().emit(record)

    def write_held(self) -> None:
        """Write what was kept, and whatever comes from now on."""
        held, self.held = self.held or [], None
        for record in held:
            super().emit(record)


def begin_log() -> None:
    """Write to this rank's log file from now on: the run is known to begin."""
    for handler in log.handlers:
        if isinstance(handler, _HeldFile):
            handler.write_held()


def _add_handlers(path: Path, console: bool) -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    file = _HeldFile(path)
    file.handleError = _report_once(str(path))  # type: ignore[method-assign,assignment]
    file.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    if console:
        if sys.stderr.isatty():
            from pretrain.metrics import console as shared

            live = RichHandler(console=shared, show_path=False, highlighter=None)
            live.setFormatter(LogFormatter("%(message)s"))
            log.addHandler(live)
        else:
            plain = logging.StreamHandler(sys.stderr)
            plain.setFormatter(LogFormatter("%(message)s"))
            plain.handleError = _report_once("standard error")  # type: ignore[method-assign,assignment]
            log.addHandler(plain)


def _report_once(place: str) -> Callable[[logging.LogRecord], None]:
    """A handler's answer to an error in writing `place`: the run goes on, and says so once, in the
    logs that can be written."""
    reported = False

    def report(_: logging.LogRecord) -> None:
        nonlocal reported
        if not reported:
            reported = True
            log.warning("%s cannot be written (%s): the run goes on", place, sys.exc_info()[1])

    return report


def _record_environment(path: Path, world_size: int) -> None:
    """Append what this start ran on: a requeued run may meet other machines and versions."""
    starts: list[Any] = []
    try:
        starts = [*read_starts(path.parent)]
    except UntrustedError as error:
        aside = path.with_name("environment.damaged.json")
        path.rename(aside)
        log.warning("%s It is now %s, and the run goes on.", error, aside)
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": redact_arguments(sys.argv),
            "host": platform.node(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "world_size": world_size,
            "git_revision": git_revision(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
            "packages": installed_packages(),
        }
    )
    write_durably(path, json.dumps(starts, indent=1).encode())


@cache
def installed_packages() -> dict[str, str]:
    """Return the version of every installed package."""
    described = (d.metadata for d in distributions())  # each access to .metadata parses the file
    return {found["Name"]: found["Version"] for found in described if found["Name"]}


VERSIONS = ("transxssm", "torch", "triton", "deepspeed", "megatron-core", "numpy")


def package_versions() -> dict[str, str]:
    """Of this program and what it computes with."""
    return {name: version(name) for name in VERSIONS if _is_installed(name)}


def _is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def git_revision() -> str:
    """Commit of the source tree this runs from, with "+changes" if it is not clean, or ""."""
    source = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        revision = git("rev-parse", "HEAD")
        return revision + ("+changes" if revision and git("status", "--porcelain") else "")
    except OSError:  # git is not installed
        return ""
