"""When to stop before the end of the run: signals, and the end of the job's time.

SIGUSR1 (Slurm's before a time limit or a preemption), SIGTERM and a first Ctrl-C ask; so does the
time that Slurm has left for the job. The loop over steps agrees with all ranks, saves, and every
rank exits with REQUEUE. Before training has begun there is nothing to save: signals end the process
at once.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

log = logging.getLogger("transxssm")

REQUEUE = 85
"""Exit code: everything is saved, run the same command again."""
SECONDS_BETWEEN_LOOKS = 10.0  # at the time that is left

SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}

_reason: str | None = None
_outlived = False


def requested() -> str | None:
    """Why this rank was asked to stop, or None."""
    return _reason


def request(reason: str) -> None:
    """Ask this rank to stop; the first reason stands."""
    global _reason
    _reason = _reason or reason


def listen() -> None:
    """Take the signals from now on. Of the main thread, before there are others.

    A thread waits for them, since the main one may be inside a collective that does not return;
    what a thread that was there before is sent comes to the main one.
    """
    for number in SIGNALS:
        signal.signal(number, _take)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_wait_for_signals, name="signals", daemon=True).start()


def _wait_for_signals() -> None:
    while True:
        _take(signal.sigwait(SIGNALS), None)


def _take(number: int, _: FrameType | None) -> None:
    interrupted_again = number == signal.SIGINT and requested() == "SIGINT"
    if not _outlived or interrupted_again:
        os._exit(REQUEUE if number == signal.SIGUSR1 else 128 + number)
    request(signal.Signals(number).name)


def outlive_signals() -> None:
    """From now on they ask to stop and do not end the process: there is something to save or to
    say."""
    global _outlived
    _outlived = True


def exit_for_requeue() -> NoReturn:
    """End this process with REQUEUE; signals no longer end it otherwise."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(REQUEUE)  # the interpreter's end would wait for threads that read ahead


# -- the job's time --------------------------------------------------------------------------------


def seconds_left(job_id: str) -> float | None:
    """Until Slurm ends the job, by squeue; None without a limit.

    Raises OSError or subprocess.SubprocessError when squeue does not answer.
    """
    words = ["squeue", "--noheader", "--jobs", job_id, "--format", "%L"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    return parse_time(done.stdout)


def parse_time(text: str) -> float | None:
    """Seconds of Slurm's [days-][[hours:]minutes:]seconds; None for words (UNLIMITED, NOT_SET)."""
    found = re.fullmatch(r"(-?)(?:(\d+)-)?((?:\d+:){0,2}\d+)", text.strip())
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
    try:
        return seconds_left(job_id)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("squeue does not tell how much time job %s has left: %s", job_id, error)
        return None
