"""The training half of `make gpu-check`: the demo on this host's GPUs, against the CPU's curve.

Trains the demo's model in float32 on one CPU process and on GPUs under several layouts (ZeRO 1 to
3; with two GPUs or more also data, tensor, pipeline and context parallel), and in bf16. Then one of
the runs is resumed from a checkpoint of its middle, exported, evaluated in both forms on the GPU
and on the CPU, and generates.

Exits with 1 when a curve leaves the CPU's by more than its bound, a resumed one its own, or when
the bits per byte of the evaluations differ.
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
from pretrain.config import load_config

TRANSXSSM = [sys.executable, "-m", "pretrain"]
STEPS = 20
BOUNDS = {"fp32": 1e-3, "bf16": 2e-2}  # of the losses, relative
BITS_BOUND = 1e-4  # of bits per byte, relative
ROWS = 8  # of validation
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


def train(
    folder: Path, processes: int, dtype: str, options: list[str], steps: int, *, gpu: bool = True
) -> list[float]:
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
        check=True, env=None if gpu else without_gpus(),
    )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def bits_per_byte(model: Path, *, gpu: bool) -> float:
    """Of ROWS sequences of the validation set, in float32, by `transxssm evaluate`."""
    printed = subprocess.run(
        [*TRANSXSSM, "evaluate", str(model), "--data", str(load_config(CONFIG).data.validation),
         "--limit", str(ROWS), "--json"],
        check=True, stdout=subprocess.PIPE, env=None if gpu else without_gpus(),
    ).stdout  # fmt: skip
    (found,) = json.loads(printed).values()
    return float(found["bits_per_byte"])


def without_gpus() -> dict[str, str]:
    """The environment of a process that is to see none."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def furthest(losses: list[float], expected: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))


def check(
    gpus: int, steps: int, folder: Path, runs: list[tuple[int, str, list[str]]] | None = None
) -> bool:
    """Print the table; whether everything is within its bounds.

    runs: those of `layouts` by default; the last one is resumed, exported and evaluated.
    """
    console = Console(highlight=False, markup=False)
    table = Table("run", "dtype", "furthest apart", "")
    expected = train(folder / "cpu", 1, "fp32", [], steps, gpu=False)
    good = []
    for number, (processes, dtype, options) in enumerate(runs or layouts(gpus)):
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
    subprocess.run(
        [*TRANSXSSM, "checkpoint", "export", str(folder / "resumed"), str(folder / "model")],
        check=True,
    )
    bits = [
        bits_per_byte(folder / model, gpu=gpu)
        for model in ("resumed", "model")
        for gpu in (True, False)
    ]
    error = max(bits) / min(bits) - 1
    good.append(error <= BITS_BOUND)
    table.add_row(
        "bits per byte, sharded and exported, GPU and CPU", "fp32", f"{error:.1e}",
        "met" if good[-1] else "MISSED",
    )  # fmt: skip
    subprocess.run(
        [*TRANSXSSM, "generate", str(folder / "model"), "--prompt", "def ", "--max-new-tokens",
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
