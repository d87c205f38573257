"""When to stop before the end of the run: signals, and the end of the job's time.

SIGUSR1 (Slurm's before a time limit or a preemption), SIGTERM and a first Ctrl-C ask; so does the
time that Slurm has left for the job. The loop over steps agrees with all ranks, saves, and every
rank exits with REQUEUE. Before training has begun there is nothing to save: signals end the process
at once, SIGUSR1 with REQUEUE, SIGTERM with 143 and Ctrl-C with 130. SIGTERM is no reason to requeue
then: srun sends it to every rank once one has failed, and takes the largest exit code.
"""

# As little as can be: signals are handled only once this is imported
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, NoReturn

log = logging.getLogger("transxssm")

REQUEUE = 85
"""Exit code: everything is saved, run the same command again."""
SECONDS_BETWEEN_LOOKS = 10.0  # at the time that is left

SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}

PR_SET_PDEATHSIG = 1  # of prctl
SECONDS_TO_CONNECT = 5.0  # to the launcher's store

_reason: str | None = None
_outlived = False
_listening = False
_report: Callable[[Literal["stopped", "failed"], str], None] | None = None


def requested() -> str | None:
    """Why this rank was asked to stop, or None."""
    return _reason


def request(reason: str) -> None:
    """Ask this rank to stop; the first reason stands."""
    global _reason
    _reason = _reason or reason


def on_exit(report: Callable[[Literal["stopped", "failed"], str], None]) -> None:
    """Call `report` with how and why before this module ends the process at once."""
    global _report
    _report = report


def _tell(how: Literal["stopped", "failed"], why: str) -> None:
    if _report is not None:
        with contextlib.suppress(Exception):  # the process ends all the same
            _report(how, why)


def listen() -> None:
    """Install signal handlers, and end with the launcher. Call from the main thread before starting
    other threads; a second call does nothing.

    A thread waits for signals, since the main one may be inside a collective that does not return;
    what a thread that was there before is sent comes to the main one.
    """
    global _listening
    if _listening:
        return
    _listening = True
    for number in SIGNALS:
        signal.signal(number, _take)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.unraisablehook, threading.excepthook = _unraisable, _in_thread
    threading.Thread(target=_wait_for_signals, name="signals", daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()


def _wait_for_signals() -> None:
    while True:
        _take(signal.sigwait(SIGNALS), None)


def _take(number: int, _: FrameType | None) -> None:
    interrupted_again = number == signal.SIGINT and requested() == "SIGINT"
    if not _outlived or interrupted_again:
        name = signal.Signals(number).name
        when = "again, without saving" if interrupted_again else "before there was anything to save"
        with contextlib.suppress(OSError):
            os.write(2, f"stopped by {name} {when}; run the same command again\n".encode())
        _tell("stopped", f"{name} {when}")
        os._exit(REQUEUE if number == signal.SIGUSR1 else 128 + number)
    request(signal.Signals(number).name)


def _unraisable(unraisable: Any) -> None:
    """End the process when a thread could not begin for want of memory, for which the thread that
    starts it would wait for ever."""
    thread = getattr(unraisable.object, "__self__", None)
    begins = isinstance(thread, threading.Thread) and not thread._started.is_set()  # type: ignore[attr-defined]
    if begins or isinstance(unraisable.exc_value, MemoryError):
        end_without_memory()
    sys.__unraisablehook__(unraisable)


def _in_thread(arguments: Any) -> None:
    """End the process when one of its threads has no memory; others would wait for it."""
    if isinstance(arguments.exc_value, MemoryError):
        end_without_memory()
    # TensorBoard raises the same once more in the thread that writes metrics
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)


NO_MEMORY = (
    "out of memory: neither ulimit -v nor the machine gives more; raise the limit, or use a "
    "smaller model or training.micro_batch_size, or more ranks"
)


def end_without_memory() -> NoReturn:
    """Say so, and exit with 1; without allocating."""
    with contextlib.suppress(OSError):
        os.write(2, _NO_MEMORY_LINE)
    _tell("failed", NO_MEMORY)
    os._exit(1)


_NO_MEMORY_LINE = f"error: {NO_MEMORY}\n".encode()


def _end_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun, which has started it, dies.

    Under torchrun alone: a run that a shell started outlives the shell, and Slurm ends its own. The
    signal comes when the thread that started this process ends, which for torchrun is the one that
    waits for the ranks. A launcher that died earlier than this call sends none, but then its store,
    which it opens before it starts ranks, is gone.
    """
    import ctypes
    import socket

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = (env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    try:
        socket.create_connection(address, SECONDS_TO_CONNECT).close()
    except ConnectionRefusedError:
        message = "error: torchrun, which started this rank, has ended; start the job again\n"
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
        os._exit(1)
    except OSError:
        pass  # the network is slow; joining the job will tell


def outlive_signals() -> None:
    """From now on they ask to stop and do not end the process: there is something to save or to
    say."""
    global _outlived
    _outlived = True


def exit_for_requeue() -> NoReturn:
    """End this process with REQUEUE; signals no longer end it otherwise."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its terminal or pipe is gone
            stream.flush()
    os._exit(REQUEUE)  # the interpreter's end would wait for threads that read ahead


# -- the job's time --------------------------------------------------------------------------------


def seconds_left(job_id: str) -> float | None:
    """Until Slurm ends the job, by squeue; None without a limit.

    Raises OSError or subprocess.SubprocessError when squeue does not answer.
    """
    from untrusted.commands import run_bounded

    words = ["squeue", "--noheader", "--jobs", job_id, "--format", "%L"]
    done = run_bounded(words, timeout=30)
    done.check_returncode()
    return parse_time(done.stdout)


def parse_time(text: str) -> float | None:
    """Seconds of Slurm's [days-][[hours:]minutes:]seconds; None for anything else (UNLIMITED)."""
    import re

    found = re.fullmatch(r"(-?)(?:([0-9]{1,9})-)?((?:[0-9]{1,9}:){0,2}[0-9]{1,9})", text.strip())
    if found is None:
        return None
    sign, days, clock = found.groups()
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return float((seconds + 86400 * int(days or 0)) * (-1 if sign else 1))


def watch_time_left(job_id: str, margin: float) -> float | None:
    """Ask this rank to stop once the job has less than `margin` seconds left; in a thread, since
    limits can be changed while the job runs. Returns what is left now."""
    now = _time_left(job_id)

    def watch() -> None:
        while requested() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            left = _time_left(job_id)
            if left is not None and left < margin:
                request(f"job {job_id} has {left:.0f} s left")

    threading.Thread(target=watch, name="time-left", daemon=True).start()
    return now


def _time_left(job_id: str) -> float | None:
    import subprocess

    try:
        return seconds_left(job_id)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("squeue does not tell how much time job %s has left: %s", job_id, error)
        return None
