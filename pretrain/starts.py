"""How each start of a run began and ended: the events "start" and "end" of events.jsonl.

Rank 0 writes both. A start without an end is still running, was killed, or lost its machine. A
rollback is neither: the same start goes on.
"""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import stop
from pretrain.bad_steps import record_event
from pretrain.config import Config
from pretrain.records import Event, How

STATES: dict[How, str] = {"done": "finished", "stopped": "stopped", "failed": "failed"}

_open: tuple[Path, int] | None = None  # run directory and process of a start that has not ended


def record_began(run_dir: Path, step: int, message: str, **totals: int) -> None:
    """Record that this process, rank 0, starts the run after `step`; its end is then recorded, too,
    where a signal or a lack of memory ends the process at once.

    totals: `total_steps` and `total_tokens` of the run as this start makes it.
    """
    global _open
    _open = run_dir, os.getpid()
    where = {"host": platform.node(), "pid": os.getpid()}
    record_event(run_dir, "start", step=step, said=message, **where, **totals)
    stop.on_exit(record_ended)


def record_ended(how: How, message: str, **fields: Any) -> None:
    """Record how the start that this process began has ended; the first call counts.

    Does nothing in a process that began none: another rank, or a command that was refused.
    """
    global _open
    if _open is not None and _open[1] == os.getpid():
        (run_dir, _), _open = _open, None
        record_event(run_dir, "end", how=how, said=message, **fields)


def last_start(events: Sequence[Event]) -> tuple[Event | None, Event | None]:
    """Return the last "start" and the "end" that followed it, None where there is none.

    Programs before this one recorded no ends, and a start after every rollback.
    """
    start = end = None
    for event in events:
        if event["event"] == "start":
            start, end = event, None
        elif event["event"] == "end":
            end = event
    return start, end


def totals(config: Config, start: Event | None) -> tuple[int, int]:
    """Return the steps and tokens of the whole run.

    Its last start recorded them, knowing the batch sizes of the steps before it; where there is no
    such record, they are the configuration's.
    """
    if start is None or "total_steps" not in start or "total_tokens" not in start:
        return config.total_steps, config.total_tokens
    return start["total_steps"], start["total_tokens"]


def how_ended(end: Event) -> str:
    """Return the end of a start in words, e.g. "stopped (SIGTERM, all saved)"."""
    return f"{end.get('how', 'ended')} ({end.get('said', '')})"
