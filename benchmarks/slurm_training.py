"""Short training jobs on the test cluster: slow enough to be interrupted, and compared afterwards.

`python -m benchmarks.slurm_training WORDS` is the `transxssm` command whose steps take SLOW_STEP
seconds more, whose saves SLOW_SAVE, and which looks at its time every second.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command import read_metrics
from benchmarks.slurm_cluster import Cluster

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "slurm/pretrain.sbatch"
EXACT = ("step", "tokens", "samples", "loss", "grad_norm", "lr", "validation_loss")


def slow_down(step: float, save: float) -> None:
    """Of this process's training."""
    from checkpoints_tools import saving
    from pretrain import stop
    from pretrain.trainer import Trainer

    stop.SECONDS_BETWEEN_LOOKS = 1.0

    train_step, write = Trainer.train_step, saving._write

    def slow_step(trainer: Trainer, batches: Any) -> dict[str, Any] | None:
        time.sleep(step)
        return train_step(trainer, batches)

    def slow_write(*words: Any) -> Any:
        time.sleep(save)
        return write(*words)

    Trainer.train_step = slow_step  # type: ignore[method-assign, assignment]
    saving._write = slow_write  # type: ignore[assignment]


class TrainingJob:
    """slurm/pretrain.sbatch of a configuration, one task a node."""

    def __init__(
        self, cluster: Cluster, config: Path, run_dir: Path, *words: str | Path, nodes: int = 2,
        options: tuple[str, ...] = (), step: float = 0.0, save: float = 0.0,
        preflight: bool = False,
    ) -> None:  # fmt: skip
        """words: of `transxssm pretrain`; options: of sbatch."""
        program = run_dir.with_suffix(".program")
        program.write_text(
            f"#!/bin/bash\nexport SLOW_STEP={step} SLOW_SAVE={save} PYTHONPATH={ROOT}\n"
            f'exec {sys.executable} -m benchmarks.slurm_training "$@"\n'
        )
        program.chmod(0o755)
        self.cluster, self.run_dir = cluster, run_dir
        self.output = run_dir.with_suffix(".log")
        self.id = cluster.sbatch(
            f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={self.output}", *options, SCRIPT,
            config, f"--logging.run_dir={run_dir}", *words,
            cwd=ROOT, env={"TRANSXSSM": str(program), "TRANSXSSM_PREFLIGHT": str(int(preflight))},
        )  # fmt: skip

    @property
    def log(self) -> str:
        """Everything that the job printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    @property
    def step(self) -> int:
        """The last one made."""
        if not (self.run_dir / "metrics.jsonl").exists():
            return 0
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0

    @property
    def starts(self) -> int:
        """How often training has begun."""
        path = self.run_dir / "environment.json"
        return len(json.loads(path.read_text())) if path.exists() else 0

    @property
    def nodes(self) -> list[int]:
        """Where it runs."""
        names = self.cluster.run("scontrol", "show", "hostnames", self.field("NodeList")).stdout
        return [int(name.removeprefix("node")) for name in names.split()]

    def field(self, name: str) -> str:
        """What scontrol shows of it."""
        return self.cluster.job(self.id)[name]

    def until(self, come: Callable[[], bool], timeout: float = 90) -> float:
        """Wait until it has come to that; seconds. Raises TimeoutError."""
        begin = time.monotonic()
        while not come():
            if time.monotonic() > begin + timeout:
                raise TimeoutError(f"{self.cluster.job(self.id)}\n{self.log}")
            time.sleep(0.1)
        return time.monotonic() - begin

    def wait(self, timeout: float = 180) -> str:
        """Until its end; the state."""
        return self.cluster.wait(self.id, timeout=timeout)


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """What must not depend on interruptions."""
    lines = read_metrics(run_dir)
    return [{name: line[name] for name in EXACT if name in line} for line in lines]


if __name__ == "__main__":
    from pretrain.cli import main

    if sys.argv[1] == "pretrain":
        slow_down(float(os.environ["SLOW_STEP"]), float(os.environ["SLOW_SAVE"]))
    main()
