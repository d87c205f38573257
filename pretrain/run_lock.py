"""One job a run: rank 0 locks RUN/run.lock, which names its host, process and Slurm job.

The lock itself is the file system's (lockf): it belongs to one process, ends with it, and NFS
shares it between hosts. A start that finds the record of a process that has ended takes the run
over. The record decides where the lock alone cannot: on file systems without locks, or where a node
died and its file server has not noticed yet.
"""

import fcntl
import json
import logging
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from parallel.launch import host_name
from pretrain.config import ConfigError
from untrusted.commands import run_bounded
from untrusted.errors import UntrustedError
from untrusted.files import NO_LOCKS, open_lock
from untrusted.records import Count, parse_json

log = logging.getLogger("transxssm")

FILE = "run.lock"
MAX_BYTES = 4096
SECONDS_TO_WRITE = 1.0  # for a job that has just made the file to write its record into it
SECONDS_TO_ANSWER = 20.0  # of squeue
NOT_STARTED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip


class Holder(TypedDict):
    """Content of run.lock: the process that has the run."""

    host: str
    pid: Count
    process_started: str
    """As the kernel counts it: another process may get the same pid later."""
    job_id: str
    """Slurm's; empty outside of Slurm."""
    job_restarts: Count
    since: str


HOLDER = TypeAdapter(Holder)

_held: dict[Path, int] = {}
"""Lock files of this process, and their descriptors: closing one gives the lock up."""


def hold(folder: Path) -> None:
    """Make this process the only one that writes into a folder; again for one it has: nothing.

    The folder must exist. Rank 0 only. Raises ConfigError, which names the holder, and OSError.
    """
    path = folder.resolve() / FILE
    if path in _held:
        return
    while True:
        file = open_lock(path)
        try:
            locked = _lock(file)
            holder = _read(file, wait=locked is not True)
            reason = _why_free(holder, locked)
            if reason is None:
                raise ConfigError(_in_use(folder, path, holder))
            if locked is not True:  # its lock cannot be had: a new file in the place of this one
                _remove_if_same(path, file)
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                os.close(file)
                file = open_lock(path)
                _lock(file)
            if not _is_at(path, file):  # released, or taken over, between our open and our lock
                os.close(file)
                continue
            _write(file)
        except FileExistsError:  # another start has taken it over just now
            os.close(file)
            continue
        except BaseException:
            with suppress(OSError):
                os.close(file)
            raise
        if holder is not None:
            log.warning("%s: taking the run over, since %s", path, reason)
        _held[path] = file
        return


def release() -> None:
    """Give up all folders that this process holds."""
    for path, file in _held.items():
        with suppress(OSError):
            _remove_if_same(path, file)
        os.close(file)
    _held.clear()


def refuse_held(folder: Path, *, except_job: str = "") -> None:
    """Raise ConfigError where a job, other than `except_job`, trains in a folder."""
    path = folder / FILE
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        locked = _lock(file)
        holder = _read(file, wait=False)
        if _why_free(holder, locked) is None and not (
            holder and except_job and holder["job_id"] == except_job
        ):
            raise ConfigError(_in_use(folder, path, holder))
    finally:
        os.close(file)


# -- who has it ------------------------------------------------------------------------------------


def _lock(file: int) -> bool | None:
    """Whether this process has the lock now; None where the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if isinstance(error, (BlockingIOError, PermissionError)):  # EAGAIN or EACCES
            return False
        raise
    return True


def _why_free(holder: Holder | None, locked: bool | None) -> str | None:
    """Why the run may be taken, or None if its holder may be at work."""
    if holder is None:
        return None if locked is False else "its record is empty"
    who = f"process {holder['pid']} on {holder['host']}"
    if holder["host"] == host_name():
        # where there are no locks, the kernel's list of processes tells
        is_alive = locked is False or _process_start(holder["pid"]) == holder["process_started"]
        return None if is_alive and not locked else f"{who} has ended"
    # On a file system of one host, or with locks between hosts, its process is gone. With a job
    # Slurm tells, in case hosts do not see each other's locks.
    if locked and holder["job_id"] in ("", _job()[0]):
        return f"{who} has ended"
    if holder["job_id"] and (ended := _job_has_ended(holder)):
        return f"{who} has ended: {ended}"
    return None


def _job_has_ended(holder: Holder) -> str:
    """In words, or "" if the holder's Slurm job may be at work. Slurm does not start a job again
    before all processes of its earlier start have ended."""
    job_id, restarts = holder["job_id"], holder["job_restarts"]
    own, own_restarts = _job()
    if job_id == own:
        # The ranks of one start are of one job step, which has one rank 0 at a time
        return f"it was start {restarts + 1} of this job" if restarts < own_restarts else ""
    try:
        words = ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"]
        done = run_bounded(words, timeout=SECONDS_TO_ANSWER)
    except (OSError, subprocess.SubprocessError):
        return ""
    if done.returncode:
        unknown = "invalid job id" in (done.stderr or "").lower()
        return f"Slurm does not know job {job_id} any more" if unknown else ""
    states = set((done.stdout or "").split())
    is_over = states <= ENDED | NOT_STARTED
    return f"job {job_id} is {', '.join(sorted(states)).lower() or 'over'}" if is_over else ""


def _in_use(folder: Path, path: Path, holder: Holder | None) -> str:
    if holder is None:
        who = "another process, which has just started,"
    else:
        job = f" (Slurm job {holder['job_id']})" if holder["job_id"] else ""
        who = f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']},"
    return (
        f"{folder} is in use: {who} trains there; wait until it ends, end it, or choose another "
        f"logging.run_dir (and checkpoint.dir). If it cannot be running any more, remove {path}"
    )


def _process_start(pid: int) -> str:
    """When a process of this host began, in the kernel's ticks; "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22, the 20th after the name


def _job() -> tuple[str, int]:
    """Slurm's number of this job, or "", and how often it has been started again."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdecimal() else 0


# -- the file --------------------------------------------------------------------------------------


def _read(file: int, *, wait: bool) -> Holder | None:
    """The record, or None where there is none. wait: for one that is being written."""
    give_up = time.monotonic() + SECONDS_TO_WRITE
    while True:
        content = os.pread(file, MAX_BYTES, 0)
        with suppress(UntrustedError):
            return parse_json(content, HOLDER, FILE, "")
        if not wait or time.monotonic() > give_up:
            return None
        time.sleep(0.05)


def _write(file: int) -> None:
    job_id, restarts = _job()
    holder = Holder(
        host=host_name(),
        pid=os.getpid(),
        process_started=_process_start(os.getpid()),
        job_id=job_id,
        job_restarts=restarts,
        since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    content = json.dumps(holder).encode() + b"\n"
    os.pwrite(file, content, 0)
    os.ftruncate(file, len(content))
    os.fsync(file)


def _is_at(path: Path, file: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.lstat(path))
    return False


def _remove_if_same(path: Path, file: int) -> None:
    """Remove the lock file, unless another start has replaced it."""
    if _is_at(path, file):
        path.unlink(missing_ok=True)
