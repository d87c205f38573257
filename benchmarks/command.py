"""Run the `transxssm` command as ranks forked from the server of benchmarks.ranks."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ranks import _context, free_port

LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Ended:
    """How a rank ended, and what it printed on both streams."""

    code: int
    """Exit code, or minus the signal that killed it."""
    output: str
    seconds: float


def run_command(
    *words: str | Path,
    ranks: int = 1,
    before: Callable[[], None] | None = None,
    kill_after: float = LIMIT_SECONDS,
) -> list[Ended]:
    """`transxssm WORDS` on every rank; ranks still alive after `kill_after` seconds are SIGKILLed.

    `before` is importable and is called in each rank first: the place to inject a fault.
    """
    port = free_port()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank-{rank}" for rank in range(ranks)]
        processes = []
        for rank, output in enumerate(outputs):
            environment: dict[str, Any] = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = _context.Process(
                target=_run_rank,
                args=([str(w) for w in words], environment if ranks > 1 else {}, output, before),
            )
            process.start()
            processes.append(process)
        ended = []
        for process, output in zip(processes, outputs, strict=True):
            process.join(max(0.0, kill_after - (time.monotonic() - begin)))
            process.kill()
            process.join()
            text = output.read_text() if output.exists() else ""
            ended.append(Ended(process.exitcode or 0, text, time.monotonic() - begin))
    return ended


def _run_rank(
    words: list[str],
    environment: dict[str, Any],
    output: Path,
    before: Callable[[], None] | None,
) -> None:
    import torch

    os.environ |= {name: str(value) for name, value in environment.items()}
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    from pretrain.cli import main

    sys.argv = ["transxssm", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
