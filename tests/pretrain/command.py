"""Run the `transxssm` command as ranks forked from the server of tests.ranks, as a launcher would."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import dump_config
from tests.ranks import _context
from tests.tiny import tiny_config

LIMIT_SECONDS = 60


@dataclass(frozen=True)
class Ended:
    """How a rank ended, and what it printed."""

    code: int
    """Exit code; minus the signal that killed it."""
    output: str
    seconds: float


def write_config(folder: Path, data: Path, **sections: dict[str, Any]) -> Path:
    """A TOML file of a short run on the tiny data whose run directory is folder/run."""
    training = {"steps": 6, "global_batch_size": 4, "eval_every": 3, "eval_batches": 1}
    sections["training"] = training | sections.get("training", {})
    sections["checkpoint"] = {"every": 2} | sections.get("checkpoint", {})
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text(dump_config(tiny_config(data, folder / "run", **sections)))
    return path


def run_command(
    *words: str | Path,
    world_size: int = 1,
    before: Callable[[], None] | None = None,
    kill_after: float = LIMIT_SECONDS,
) -> list[Ended]:
    """`transxssm WORDS` on every rank; SIGKILLed after so many seconds.

    `before` is importable and is called in each rank first: the place to inject a fault.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    receiver, sender = os.pipe()
    os.close(sender)
    os.close(receiver)
    begin = time.monotonic()
    outputs, processes = [], []
    for rank in range(world_size):
        pipe, end = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_run, args=([str(w) for w in words], rank, world_size, port, end, before)
        )
        process.start()
        end.close()
        outputs.append(pipe)
        processes.append(process)
    ended = []
    for pipe, process in zip(outputs, processes, strict=True):
        process.join(max(0.0, kill_after - (time.monotonic() - begin)))
        process.kill()
        process.join()
        seconds = time.monotonic() - begin
        ended.append(Ended(process.exitcode or 0, "", seconds))
    return ended


def _run(*args: Any) -> None: ...
