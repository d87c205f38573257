"""What is known of runs, from their directories and from Slurm."""

import os
import platform
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pretrain.bad_steps import EVENTS
from pretrain.config import Config, ConfigError, load_config
from pretrain.records import EVENT, Event
from pretrain.run_dir import check_run
from pretrain.starts import STATES, how_ended, last_start, totals
from slurm.jobs import JobLog, known_jobs
from untrusted.errors import RecordError, UntrustedError
from untrusted.files import open_regular, read_regular
from untrusted.records import Count, Finite, parse_json, read_state

RECENT_STEPS = 20  # whose rate foretells the rest
SHOWN_STEPS = 40
TAIL_BYTES = 100_000
EVENT_BYTES = 1 << 22  # read of events.jsonl, at its end
RANK_0 = "logs/rank-0.log"
LOG_DELAY = 5.0  # seconds by which a job's log may be behind that of rank 0, which it has, too
SIGN_OF_LIFE = 60.0  # seconds within which a run of a program that recorded no process has written
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
T = TypeVar("T")


@dataclass(frozen=True)
class RunStatus:
    """Of one run; None where it is not known."""

    run_dir: str
    state: str
    """Slurm's while a job waits or runs; else not started, running, finished, failed, stopped, or
    killed: ended, and nothing recorded how."""
    step: int
    total_steps: int
    loss: float | None
    recent_losses: list[float]
    """Of the last steps, oldest first."""
    tokens_per_second: float | None
    starts: int
    seconds_left: float | None
    """Of training, at the rate of the recent steps; None for a finished run."""
    job_id: str | None
    nodes: str
    job_time_left: str
    checkpoint: str | None
    skipped_updates: int
    rollbacks: int
    failure: str | None
    """Cause, where the last start failed."""
    ended: str | None = None
    """How and when the last start ended."""
    damaged: list[str] = field(default_factory=list)
    """A sentence for each file of the run that cannot be read, or not in whole."""


OVER = ("finished", "failed", "stopped", "killed")
"""States in which nothing of the run goes on."""


def run_status(run_dir: Path, jobs: dict[str, dict[str, str]] | None = None) -> RunStatus:
    """jobs: those that wait or run, asked of Slurm where not given.

    Raises ConfigError when this is not a run directory, or its configuration cannot be read.
    """
    check_run(run_dir)
    config = load_config(run_dir / "config.toml")
    jobs = known_jobs() if jobs is None else jobs
    record = JobLog(run_dir)
    damaged = list(record.faults)
    lines = _lines(run_dir / "metrics.jsonl", STEP, damaged)
    start, end = last_start(_lines(run_dir / EVENTS, EVENT, damaged, EVENT_BYTES))
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
    total, total_tokens = totals(config, start)
    # the metrics of a step that a stop left without its evaluation are written by the next start
    ended_at = 0 if end is None else end.get("step", 0)
    step = max(last.get("step", 0), ended_at)
    left = max(0, total_tokens - last.get("tokens", 0))
    failed = _text(run_dir / "logs/first_failure.txt", damaged)
    if end is not None and end.get("how") == "failed":
        failed = failed or end.get("said")
    state = job.get("state", "").lower()
    state = state or _state_without_job(run_dir, config, start, end, step >= total, failed)
    latest = _text(config.checkpoint_dir / "latest", damaged)
    losses = [loss for line in lines if (loss := line.get("loss")) is not None]
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        step=step,
        total_steps=total,
        loss=last.get("loss"),
        recent_losses=losses[-SHOWN_STEPS:],
        tokens_per_second=rate,
        starts=_starts(run_dir / "environment.json", damaged),
        seconds_left=None if not rate or state == "finished" else left / rate,
        job_id=job_id,
        nodes=job.get("nodes", ""),
        job_time_left=job.get("time_left", ""),
        checkpoint=None if latest is None else latest.strip(),
        skipped_updates=last.get("skipped_updates", 0),
        rollbacks=last.get("rollbacks", 0),
        failure=failed,
        ended=None if end is None else f"{how_ended(end)}, {end.get('time', '')}".rstrip(", "),
        damaged=damaged,
    )


def _state_without_job(
    run_dir: Path,
    config: Config,
    start: Event | None,
    end: Event | None,
    done: bool,
    failure: str | None,
) -> str:
    """Return the state of a run of which Slurm knows no job, by the events of its last start."""
    if end is not None and "how" in end:
        return STATES[end["how"]]
    alive = _is_alive(config, start, newest=_last_written(run_dir))
    if start is not None and "pid" in start:
        return "failed" if failure else "running" if alive else "killed"
    if done:  # what follows is for runs of programs that recorded no ends
        return "finished"
    if failure:
        return "failed"
    begun = (run_dir / "metrics.jsonl").is_file()
    return "not started" if not begun else "running" if alive else "stopped"


def _is_alive(config: Config, start: Event | None, newest: float) -> bool:
    """Return whether the last start's process exists, if that is on this host; else whether the run
    has written anything recently. newest: when it last did (Unix time)."""
    quiet = time.time() - newest
    if start is None or "pid" not in start:
        return quiet < SIGN_OF_LIFE
    if start.get("host") != platform.node():  # the watchdog ends what is quiet for longer
        return quiet < max(SIGN_OF_LIFE, 2 * (config.training.hang_timeout or 600.0))
    try:
        os.kill(start["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _last_written(run_dir: Path) -> float:
    """Return when metrics, events or rank 0's log last changed (Unix time); 0 for none."""
    return max(map(_changed, [run_dir / "metrics.jsonl", run_dir / EVENTS, run_dir / RANK_0]))


def _lines(
    path: Path, kind: TypeAdapter[T], damaged: list[str], max_bytes: int = TAIL_BYTES
) -> list[T]:
    """Return the last entries of a JSON-lines file, without the line that is being written."""
    try:
        with open_regular(path, follow_link=True) as file:
            file.seek(0, 2)
            start = max(0, file.tell() - max_bytes)
            file.seek(start)
            content = file.read(max_bytes)
    except FileNotFoundError:
        return []
    except (OSError, UntrustedError) as error:
        damaged.append(_unreadable(path, error))
        return []
    found, faults = [], []
    whole = content.split(b"\n")[:-1]
    for line in whole[1:] if start else whole:
        try:
            found.append(parse_json(line, kind, str(path), "its damaged lines are left out"))
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
    """Return the run directories in a folder, the one written to last first.

    Raises ConfigError where there is no such folder.
    """
    if not folder.is_dir():
        near = Path("runs") / folder
        hint = f"; did you mean {near}" if near.is_dir() else "; name a folder of run directories"
        raise ConfigError(f"{folder}: there is no such folder{hint}")
    marks = ("jobs.jsonl", "environment.json")  # submitted; or begun
    found = {path.parent for mark in marks for path in folder.glob(f"**/{mark}")}
    return sorted(found, key=_written, reverse=True)


def _written(run_dir: Path) -> float:
    """When something in it changed last; 0 where that cannot be seen."""
    try:
        return max((path.lstat().st_mtime for path in run_dir.iterdir()), default=0.0)
    except OSError:  # removed meanwhile, or not ours to read
        return 0.0


def newest_log(run_dir: Path, rank: int | None = None) -> Path:
    """Return the log to show: of `rank`, else of the newest job, or of rank 0 where the run last
    went on without Slurm.

    Raises ConfigError where there is none.
    """
    of_ranks = {
        int(found[1]): path
        for path in run_dir.glob("logs/rank-*.log")
        if path.is_file() and (found := re.fullmatch(r"rank-([0-9]{1,9})\.log", path.name))
    }
    if rank is not None and rank in of_ranks:
        return of_ranks[rank]
    if rank is not None and of_ranks:
        there = f"rank {min(of_ranks)}" + (f" to {max(of_ranks)}" if len(of_ranks) > 1 else "")
        raise ConfigError(f"{run_dir}: rank {rank} has no log; there is that of {there}")
    jobs = [path for path in run_dir.glob("job-*.log") if path.is_file()]
    job = max(jobs, key=_changed, default=None)
    first = of_ranks[min(of_ranks)] if of_ranks else None
    if rank is None and job and (not first or _changed(job) > _changed(first) - LOG_DELAY):
        return job
    if rank is None and first:
        return first
    check_run(run_dir)
    raise ConfigError(f"{run_dir}: nothing is logged yet; see transxssm status {run_dir}")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0
