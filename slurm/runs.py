"""What is known of runs, from their directories and from Slurm."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, load_config
from slurm.jobs import job_ids, known_jobs

RECENT_STEPS = 20  # whose rate foretells the rest
SHOWN_STEPS = 40


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


def run_status(run_dir: Path, jobs: dict[str, dict[str, str]] | None = None) -> RunStatus:
    """jobs: those that wait or run, asked of Slurm where not given. Raises ConfigError when this is
    not a run directory."""
    if not (run_dir / "config.toml").exists():
        raise ConfigError(f"{run_dir}: no run directory, there is no config.toml")
    config = load_config(run_dir / "config.toml")
    jobs = known_jobs() if jobs is None else jobs
    lines = _lines(run_dir / "metrics.jsonl")
    last = lines[-1] if lines else {}
    ids = job_ids(run_dir)
    job_id = next((i for i in reversed(ids) if i in jobs), ids[-1] if ids else None)
    job = jobs.get(job_id or "", {})
    rates = [line["tokens_per_second"] for line in lines[-RECENT_STEPS:]]
    rate = sum(rates) / len(rates) if rates else None
    step, total = last.get("step", 0), config.total_steps
    left = config.total_tokens - last.get("tokens", 0)
    failure = run_dir / "logs/first_failure.txt"
    failed = failure.read_text() if failure.exists() else None
    latest = config.checkpoint_dir / "latest"
    starts = run_dir / "environment.json"
    return RunStatus(
        run_dir=str(run_dir),
        state=job.get("state", "").lower() or _state_without_job(run_dir, step >= total, failed),
        step=step,
        total_steps=total,
        loss=last.get("loss"),
        recent_losses=[line["loss"] for line in lines if line["loss"] is not None][-SHOWN_STEPS:],
        tokens_per_second=rate,
        starts=len(json.loads(starts.read_text())) if starts.exists() else 0,
        seconds_left=left / rate if rate else None,
        job_id=job_id,
        nodes=job.get("nodes", ""),
        job_time_left=job.get("time_left", ""),
        checkpoint=latest.read_text().strip() if latest.exists() else None,
        skipped_updates=last.get("skipped_updates", 0),
        rollbacks=last.get("rollbacks", 0),
        failure=failed,
    )


def _state_without_job(run_dir: Path, done: bool, failure: str | None) -> str:
    """Of a run of which Slurm knows nothing (any more)."""
    if done:
        return "finished"
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists() and time.time() - metrics.stat().st_mtime < 60 and not failure:
        return "running"
    return "failed" if failure else "stopped" if metrics.exists() else "not started"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The last of a metrics file, without what is being written."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 100_000))
        text = file.read().decode(errors="replace")
    found = []
    for line in text.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("}\n"):
            found.append(json.loads(line))
    return found


def find_runs(folder: Path) -> list[Path]:
    """Run directories in a folder, the one written to last first."""
    marks = ("jobs.jsonl", "environment.json")  # submitted; or begun
    found = {path.parent for mark in marks for path in folder.glob(f"**/{mark}")}
    return sorted(found, key=_written, reverse=True)


def _written(run_dir: Path) -> float:
    return max(path.stat().st_mtime for path in run_dir.iterdir())
