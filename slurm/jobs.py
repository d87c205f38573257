"""Slurm's commands, and which jobs a run had: RUN/jobs.jsonl."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pretrain.console import warn
from untrusted.commands import run_bounded
from untrusted.errors import UserError
from untrusted.files import check_place
from untrusted.records import read_json_lines
from untrusted.text import printable

JOBS = "jobs.jsonl"
ANSWER_SECONDS = 300.0  # Slurm's commands repeat by themselves while a controller is busy
WAITING_OR_RUNNING = {
    "PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "COMPLETING",
    "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "SPECIAL_EXIT",
}  # fmt: skip
JobId = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,18}$")]


class JobEntry(TypedDict):
    """A line of jobs.jsonl."""

    job_id: JobId


JOB_ENTRY = TypeAdapter(JobEntry)


class SlurmError(UserError):
    """Slurm is absent, or refuses; the message has its own words."""


def slurm(*words: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command of Slurm prints, with what is not UTF-8 replaced. Raises SlurmError."""
    if shutil.which(words[0]) is None:
        raise SlurmError(
            f"{words[0]} is not on PATH: submit from a node of the cluster, or see what would be "
            "submitted with --dry-run"
        )
    try:
        done = run_bounded(words, timeout=ANSWER_SECONDS, environment=environment)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{words[0]} gave no answer for {ANSWER_SECONDS:g} s; see with `sinfo` whether Slurm "
            "is up, and with `squeue --me` which jobs there are, before you try again"
        ) from error
    except subprocess.SubprocessError as error:
        raise SlurmError(f"{error}; mend the command that PATH finds") from error
    except OSError as error:
        raise SlurmError(f"{words[0]} cannot be run ({error.strerror}); mend PATH") from error
    if done.returncode:
        reply = printable((done.stderr or done.stdout).strip()) or "no message"
        raise SlurmError(f"{' '.join(words[:2])}: {reply} (exit code {done.returncode})")
    return done.stdout


def read_job_id(answer: str) -> str:
    """The job's id in what `sbatch --parsable` prints. Raises SlurmError."""
    last = answer.strip().rpartition("\n")[2]
    found = re.fullmatch(r"([1-9][0-9]{0,18})(;[A-Za-z0-9_.-]+)?", last.strip())
    if found is None:
        printed = f"'{printable(answer.strip())[:200]}'" if answer.strip() else "nothing"
        raise SlurmError(
            f"sbatch ended without an error, but printed {printed} in place of a job's number, so "
            "it is not known whether there is a job; look with `squeue --me` before you submit "
            "again"
        )
    return found[1]


class JobLog:
    """jobs.jsonl of a run: the ids of its jobs, the newest last, and a sentence a damaged line."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / JOBS
        lines = read_json_lines(self.path, JOB_ENTRY)
        self.job_ids = [entry["job_id"] for entry in lines.entries]
        self.faults = lines.faults

    def check_writable(self) -> None:
        """Raises OSError or UntrustedError where `add` would fail, before there is a job."""
        check_place(self.path)
        if self.path.exists():
            self.path.open("ab").close()

    def add(self, job_id: str) -> None:
        """Note a submitted job. Raises SlurmError."""
        entry = {"job_id": job_id, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            with self.path.open("a+b") as file:
                file.seek(0, os.SEEK_END)
                if file.tell():  # a line that was cut off must not spoil this one
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write(json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise SlurmError(
                f"job {job_id} is submitted, but {self.path} cannot be written "
                f"({error.strerror}): `transxssm cancel` will not know it; note its number, or end "
                f"it with `scancel {job_id}`"
            ) from error


def known_jobs() -> dict[str, dict[str, str]]:
    """As active_jobs, for those who only look: where Slurm does not answer they are told so, and
    there is none."""
    try:
        return active_jobs()
    except SlurmError as error:
        first = printable(str(error).partition("\n")[0])
        warn(f"Slurm does not answer, and jobs are not shown: {first}")
        return {}


def active_jobs() -> dict[str, dict[str, str]]:
    """This user's jobs that wait or run, by id: state, nodes, restarts, time left, reason; empty
    where there is no Slurm. An array's jobs are under the id of the array. Raises SlurmError."""
    if shutil.which("squeue") is None:
        return {}
    fields = "JobArrayID:64,State:32,NodeList:256,RestartCnt:32,TimeLeft:32,Reason:128"
    widths = [int(field.split(":")[1]) for field in fields.split(",")]
    found: dict[str, dict[str, str]] = {}
    answer = slurm("squeue", "--noheader", "--me", "--Format", fields)
    for line in filter(str.strip, answer.split("\n")):
        values, at = [], 0
        for width in widths:
            values.append(line[at : at + width].strip())
            at += width
        names = ("state", "nodes", "restarts", "time_left", "reason")
        job_id = re.split(r"[_+]", values[0])[0]  # of an array, or of a job of several parts
        job = dict(zip(names, values[1:], strict=True))
        if not (re.fullmatch("[0-9]+", job_id) and job["state"]):
            raise SlurmError(
                f"squeue printed '{printable(line.strip())[:200]}', which is not a line about a "
                "job; see what `squeue --me` says"
            )
        if job_id not in found or job["state"] == "RUNNING":
            found[job_id] = job
    return found
