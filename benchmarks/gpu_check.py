"""The training half of `make gpu-check`: the demo on this host's GPUs, against the CPU's curve.

Trains the demo's model in float32 on one CPU process and on GPUs under several layouts (ZeRO 1 to
3; with two GPUs or more also data, tensor, pipeline and context parallel), and in bf16. Then one of
the runs is resumed from a checkpoint of its middle, exported, and generates.

Exits with 1 when a curve leaves the CPU's by more than its bound, or a resumed one its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.demo import CONFIG, prepare_data

STEPS = 20
BOUNDS = {"fp32": 1e-3, "bf16": 2e-2}  # of the losses, relative
MOST_GPUS = 8  # as many as the demo's batch has sequences


def layouts(gpus: int) -> list[tuple[int, str, list[str]]]:
    """(processes, dtype, options) of every run."""
    zero = [["--parallel.zero_stage", str(stage)] for stage in (1, 2, 3)]
    runs = [(1, "fp32", options) for options in zero]
    if gpus > 1:
        runs += [(2, "fp32", options) for options in zero]
        runs += [
            (2, "fp32", [f"--parallel.{axis}", "2"]) for axis in ("tensor", "pipeline", "context")
        ]
    if gpus > 3:
        runs.append((4, "fp32", ["--parallel.tensor", "2", "--parallel.pipeline", "2"]))
    most = min(MOST_GPUS, 1 << (gpus.bit_length() - 1))
    return [*runs, (most, "fp32", []), (most, "bf16", [])]


def train(folder: Path, processes: int, dtype: str, options: list[str], steps: int) -> list[float]:
    """Train the demo in a run directory; losses by step. A failure raises CalledProcessError."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher += ["-m"]
    subprocess.run(
        [*launcher, "pretrain", "pretrain", str(CONFIG), "--logging.run_dir", str(folder),
         "--training.steps", str(steps), "--training.micro_batch_size", "1",
         "--training.eval_every", "0", "--training.dtype", dtype, "--logging.tensorboard", "false",
         "--logging.every", str(steps), "--checkpoint.every", str(max(1, steps // 2)), *options],
        check=True,
    )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def furthest(losses: list[float], expected: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))


def check(gpus: int, steps: int, folder: Path) -> bool:
    """Print the table; whether everything is within its bounds."""
    console = Console(highlight=False, markup=False)
    table = Table("run", "dtype", "furthest from the CPU", "")
    environment = os.environ.copy()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    expected = train(folder / "cpu", 1, "fp32", [], steps)
    os.environ.clear()
    os.environ |= environment
    good = []
    for number, (processes, dtype, options) in enumerate(layouts(gpus)):
        run = folder / str(number)
        error = furthest(train(run, processes, dtype, options, steps), expected)
        good.append(error <= BOUNDS[dtype])
        name = f"{processes} processes {' '.join(options)}"
        table.add_row(name, dtype, f"{error:.1e}", "met" if good[-1] else "MISSED")
        console.print(f"{name} {dtype}: {error:.1e}", style="dim")
    middle = run / "checkpoints" / f"step-{steps // 2:08d}"  # of the last one
    resumed = train(
        folder / "resumed", processes, dtype, [*options, "--checkpoint.resume", str(middle)], steps
    )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    error = furthest(resumed, [json.loads(line)["loss"] for line in lines][steps // 2 :])
    good.append(error <= BOUNDS[dtype])
    table.add_row("resumed, from its own", dtype, f"{error:.1e}", "met" if good[-1] else "MISSED")
    transxssm = [sys.executable, "-m", "pretrain"]
    subprocess.run(
        [*transxssm, "checkpoint", "export", str(folder / "resumed"), str(folder / "model")],
        check=True,
    )
    subprocess.run(
        [*transxssm, "generate", str(folder / "model"), "--prompt", "def ", "--max-new-tokens",
         "16", "--temperature", "0"],
        check=True,
    )  # fmt: skip
    console.print(table)
    console.print(f"gpu-check: {sum(good)} of {len(good)} runs met")
    return all(good)


def main() -> int:
    """The exit code."""
    if not torch.cuda.is_available():
        print("gpu-check: this host has no GPU that torch can use: NOTHING WAS CHECKED")
        return 0
    print(f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}")
    prepare_data()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if check(torch.cuda.device_count(), STEPS, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
