"""Slurm's commands, and which jobs a run had: RUN/jobs.jsonl."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

JOBS = "jobs.jsonl"
WAITING_OR_RUNNING = {
    "PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "COMPLETING",
    "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "SPECIAL_EXIT",
}  # fmt: skip


class SlurmError(Exception):
    """Slurm is absent, or refuses; the message has its own words."""


def slurm(*words: str) -> str:
    """What a command of Slurm prints. Raises SlurmError."""
    if shutil.which(words[0]) is None:
        raise SlurmError(
            f"{words[0]} is not on PATH: submit from a node of the cluster, or see what would be "
            "submitted with --dry-run"
        )
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise SlurmError(f"{' '.join(words[:2])}: {said} (exit code {done.returncode})")
    return done.stdout


def remember(run_dir: Path, job_id: str) -> None:
    """Note a submitted job."""
    entry = {"job_id": job_id, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with (run_dir / JOBS).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def job_ids(run_dir: Path) -> list[str]:
    """Of the run's jobs, the newest last."""
    path = run_dir / JOBS
    if not path.exists():
        return []
    return [json.loads(line)["job_id"] for line in path.read_text().splitlines()]


def known_jobs() -> dict[str, dict[str, str]]:
    """As active_jobs, for those who only look: where Slurm does not answer they are told so, and
    there is none."""
    try:
        return active_jobs()
    except SlurmError as error:
        first = str(error).splitlines()[0]
        print(f"warning: Slurm does not answer, and jobs are not shown: {first}", file=sys.stderr)
        return {}


def active_jobs() -> dict[str, dict[str, str]]:
    """This user's jobs that wait or run, by id: state, nodes, restarts, time left, reason; empty
    where there is no Slurm. An array's jobs are under the id of the array."""
    if shutil.which("squeue") is None:
        return {}
    fields = "JobArrayID:64,State:32,NodeList:256,RestartCnt:32,TimeLeft:32,Reason:128"
    found = {}
    for line in slurm("squeue", "--noheader", "--me", "--Format", fields).splitlines():
        widths = [int(field.split(":")[1]) for field in fields.split(",")]
        values, at = [], 0
        for width in widths:
            values.append(line[at : at + width].strip())
            at += width
        names = ("state", "nodes", "restarts", "time_left", "reason")
        job_id = values[0].partition("_")[0]
        job = dict(zip(names, values[1:], strict=True))
        if job_id not in found or job["state"] == "RUNNING":
            found[job_id] = job
    return found
