"""What is known of runs, from their directories and from Slurm."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pretrain.config import ConfigError, load_config
from slurm.jobs import JobLog, known_jobs
from untrusted.errors import RecordError, UntrustedError
from untrusted.files import open_regular, read_regular
from untrusted.records import Count, Finite, parse_json, read_state

RECENT_STEPS = 20  # whose rate foretells the rest
SHOWN_STEPS = 40
TAIL_BYTES = 100_000
TEXT_BYTES = 1 << 20
FASTEST = 1e100  # tokens a second; a rate beyond it, or below its inverse, is none


class StepMetrics(TypedDict, total=False):
    """What is shown of a line of metrics.jsonl."""

    step: Count
    tokens: Count
    loss: Finite | None
    tokens_per_second: Finite | None
    skipped_updates: Count
    rollbacks: Count


STEP = TypeAdapter(StepMetrics)
STARTS = TypeAdapter(list[dict[str, object]])


@dataclass(frozen=True)
class RunStatus:
    """Of one run; None where it is not known."""

    run_dir: str
    state: str
    """Slurm's while a job waits or runs; else finished, failed or stopped."""
    step: int
    total_steps: int
    loss: float | None
    recent_losses: list[float]
    """Of the last steps, oldest first."""
    tokens_per_second: float | None
    starts: int
    seconds_left: float | None
    """Of training, at the rate of the recent steps."""
    job_id: str | None
    nodes: str
    job_time_left: str
    checkpoint: str | None
    skipped_updates: int
    rollbacks: int
    failure: str | None
    damaged: list[str] = field(default_factory=list)
    """A sentence for each file of the run that cannot be read, or not in whole."""


def run_status(run_dir: Path, jobs: dict[str, dict[str, str]] | None = None) -> RunStatus:
    """jobs: those that wait or run, asked of Slurm where not given.

    Raises ConfigError when this is not a run directory, or its configuration cannot be read.
    """
    if not (run_dir / "config.toml").exists():
        raise ConfigError(f"{run_dir}: no run directory, there is no config.toml")
    config = load_config(run_dir / "config.toml")
    jobs = known_jobs() if jobs is None else jobs
    record = JobLog(run_dir)
    damaged = list(record.faults)
    lines = _lines(run_dir / "metrics.jsonl", damaged)
    last = lines[-1] if lines else {}
    ids = record.job_ids
    job_id = next((i for i in reversed(ids) if i in jobs), ids[-1] if ids else None)
    job = jobs.get(job_id or "", {})
    rates = [
        known
        for line in lines[-RECENT_STEPS:]
        if 1 / FASTEST < (known := line.get("tokens_per_second") or 0.0) < FASTEST
    ]
    rate = sum(rates) / len(rates) if rates else None
    step, total = last.get("step", 0), config.total_steps
    left = max(0, config.total_tokens - last.get("tokens", 0))
    failed = _text(run_dir / "logs/first_failure.txt", damaged)
    latest = _text(config.checkpoint_dir / "latest", damaged)
    losses = [loss for line in lines if (loss := line.get("loss")) is not None]
    return RunStatus(
        run_dir=str(run_dir),
        state=job.get("state", "").lower() or _state_without_job(run_dir, step >= total, failed),
        step=step,
        total_steps=total,
        loss=last.get("loss"),
        recent_losses=losses[-SHOWN_STEPS:],
        tokens_per_second=rate,
        starts=_starts(run_dir / "environment.json", damaged),
        seconds_left=left / rate if rate else None,
        job_id=job_id,
        nodes=job.get("nodes", ""),
        job_time_left=job.get("time_left", ""),
        checkpoint=None if latest is None else latest.strip(),
        skipped_updates=last.get("skipped_updates", 0),
        rollbacks=last.get("rollbacks", 0),
        failure=failed,
        damaged=damaged,
    )


def _state_without_job(run_dir: Path, done: bool, failure: str | None) -> str:
    """Of a run of which Slurm knows nothing (any more)."""
    if done:
        return "finished"
    metrics = run_dir / "metrics.jsonl"
    if metrics.is_file() and time.time() - metrics.stat().st_mtime < 60 and not failure:
        return "running"
    return "failed" if failure else "stopped" if metrics.is_file() else "not started"


def _lines(path: Path, damaged: list[str]) -> list[StepMetrics]:
    """The last of a metrics file, without what is being written."""
    try:
        with open_regular(path, follow_link=True) as file:
            file.seek(0, 2)
            start = max(0, file.tell() - TAIL_BYTES)
            file.seek(start)
            content = file.read(TAIL_BYTES)
    except FileNotFoundError:
        return []
    except (OSError, UntrustedError) as error:
        damaged.append(_unreadable(path, error))
        return []
    found, faults = [], []
    whole = content.split(b"\n")[:-1]
    for line in whole[1:] if start else whole:
        try:
            found.append(parse_json(line, STEP, str(path), "its damaged lines are left out"))
        except RecordError as error:
            faults.append(str(error))
    damaged += faults[-1:]
    return found


def _starts(path: Path, damaged: list[str]) -> int:
    try:
        starts = read_state(path, STARTS, "its starts are not counted", max_bytes=64 << 20)
        return len(starts or [])
    except UntrustedError as error:
        damaged.append(str(error))
        return 0


def _text(path: Path, damaged: list[str]) -> str | None:
    """A short text file; None if it is missing or cannot be read."""
    try:
        return read_regular(path, TEXT_BYTES, follow_link=True).decode(errors="replace")
    except FileNotFoundError:
        return None
    except (OSError, UntrustedError) as error:
        damaged.append(_unreadable(path, error))
        return None


def _unreadable(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else error
    return f"{path} cannot be read ({reason}); it is left out"


def find_runs(folder: Path) -> list[Path]:
    """Run directories in a folder, the one written to last first."""
    marks = ("jobs.jsonl", "environment.json")  # submitted; or begun
    found = {path.parent for mark in marks for path in folder.glob(f"**/{mark}")}
    return sorted(found, key=_written, reverse=True)


def _written(run_dir: Path) -> float:
    """When something in it changed last; 0 where that cannot be seen."""
    try:
        return max((path.lstat().st_mtime for path in run_dir.iterdir()), default=0.0)
    except OSError:  # removed meanwhile, or not ours to read
        return 0.0
