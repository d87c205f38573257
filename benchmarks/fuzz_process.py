"""The `transxssm` command in processes forked from this one, which has imported it, with limits."""

import contextlib
import importlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from untrusted.text import without_controls

MODULES = (
    "benchmarks.ranks_preload", "matplotlib.pyplot", "pretrain.cli", "pretrain.job",
    "pretrain.report", "pretrain.generate", "pretrain.dry_run", "pretrain.estimate_report",
    "pretrain.evaluation.command", "pretrain.layout", "slurm.submit", "slurm.runs",
    "data_pipeline.prepare", "data_pipeline.inspection", "data_pipeline.parquet",
    "checkpoints_tools.averaging", "checkpoints_tools.comparison", "checkpoints_tools.difference",
    "checkpoints_tools.export", "checkpoints_tools.importing", "checkpoints_tools.inspection",
    "checkpoints_tools.old_format", "checkpoints_tools.verify",
    "torch.utils.tensorboard",
)  # fmt: skip
FILE_BYTES = 1 << 30  # of one file
POLL_SECONDS = 0.02
EXIT_CODES = (0, 1, 2, 85, 86)  # sound; error; bad configuration; stopped, saved; bad nodes
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Limits:
    """Of one command. stop_after: seconds until SIGTERM asks it to stop, which is no fault."""

    seconds: float = 60.0
    bytes: int = 3 << 30
    stop_after: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended. broken: the limit that it was killed at, or empty."""

    code: int
    output: bytes
    seconds: float
    megabytes: float
    broken: str


def import_all() -> None:
    """Import everything that is slow to import; leaves this process with one thread."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "agg")
    for name in MODULES:
        importlib.import_module(name)


def in_a_process(function: Callable[[], object]) -> None:
    """Call a function that may start threads, in a forked process. Raises RuntimeError."""
    process = os.fork()
    if not process:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError(f"{function} failed in its process")


def run_forked(words: Sequence[str], folder: Path, limits: Limits) -> Ended:
    """`transxssm WORDS` in a process of its own, in `folder`/work."""
    output = folder / "output"
    begin = time.monotonic()
    process = os.fork()
    if not process:
        _become_command(words, folder, output)
    broken, stopped, peak = "", False, 0
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            break
        seconds = time.monotonic() - begin
        size = _resident_bytes(process)
        peak = max(peak, size)
        if size > limits.bytes:
            broken = f"it took more than {limits.bytes / 2**30:g} GiB of memory"
        elif seconds > limits.seconds:
            broken = f"it had not ended after {limits.seconds:g} s"
        if broken:
            os.killpg(process, signal.SIGKILL)
            _, status, usage = os.wait4(process, 0)
            break
        if limits.stop_after is not None and seconds > limits.stop_after and not stopped:
            stopped = True
            os.kill(process, signal.SIGTERM)
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - begin
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it left running
    code = os.waitstatus_to_exitcode(status)
    if stopped and code == 128 + signal.SIGTERM:
        code = 0
    megabytes = max(peak / 1e6, usage.ru_maxrss / 1e3)
    if not broken and megabytes * 1e6 > limits.bytes:
        broken = f"it took {megabytes:,.0f} MB of memory"
    return Ended(code, output.read_bytes(), seconds, megabytes, broken)


def _become_command(words: Sequence[str], folder: Path, output: Path) -> NoReturn:
    code = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nothing = os.open(os.devnull, os.O_RDONLY)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        for number, source in ((0, nothing), (1, descriptor), (2, descriptor)):
            os.dup2(source, number)
        work = folder / "work"
        os.chdir(work)
        os.environ |= {
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "PATH": f"{work / 'bin'}:{os.environ['PATH']}",
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }
        import tempfile

        tempfile.tempdir = None  # to be found again
        import torch

        torch.set_num_threads(1)
        from pretrain.__main__ import main

        sys.argv = ["transxssm", *words]
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _resident_bytes(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has just ended
        return 0
    return pages * resource.getpagesize()


def fault(ended: Ended) -> str:
    """What is wrong with how a command ended, in one line; empty for nothing."""
    if ended.broken:
        return ended.broken
    try:
        text = ended.output.decode()
    except UnicodeDecodeError as error:
        return f"its output is not UTF-8 at byte {error.start}"
    if TRACEBACK in text:
        lines = text[text.index(TRACEBACK) :].splitlines()[1:]
        last = next((line for line in lines if re.match(r"[A-Za-z_]", line)), lines[-1])
        return f"a traceback: {last[:200]!r}"
    if ended.code < 0:
        return f"it was ended by {signal.Signals(-ended.code).name}"
    if ended.code not in EXIT_CODES:
        return f"it ended with {ended.code}: {text[-200:]!r}"
    if without_controls(text) != text:
        return f"it printed control characters: {without_controls(text)[:200]!r}"
    if ended.code and not text.strip():
        return f"it ended with {ended.code} and said nothing"
    return ""
