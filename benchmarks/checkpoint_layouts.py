"""Checkpoints of every layout, read by every other: training goes on as if it had never stopped.

    python -m benchmarks.checkpoint_layouts [--quick] [--only NAME ...] [--out FOLDER]

A tiny model makes 3 steps under a layout, is saved, and makes 10 more, which are the curve to meet.
Each layout then loads that checkpoint, saves it again at once, and makes those 10 steps itself.
Losses are held to 1e-4 of the curve (relative, float32) and, under the layout that wrote, to its
very digits; what was saved again has every weight, moment and counter bit for bit.

Results are kept in --out, and a campaign that was stopped goes on. Exits with 1 if a pair is bad.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.checkpoint_faults import MODEL, make_data
from benchmarks.ranks import run_ranks
from benchmarks.trainers import open_trainer
from checkpoints_tools.manifest import read_manifest
from pretrain.config import Config, parse_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "data 4": (4, {}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 4": (4, {"tensor": 4}),
    "pipeline 2": (2, {"pipeline": 2}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "split [3, 1]": (2, {"pipeline": 2, "pipeline_split": [3, 1]}),
    "context 2": (2, {"context": 2}),
    "ZeRO 2 × 2": (2, {"zero_stage": 2}),
    "ZeRO 3 × 4": (4, {"zero_stage": 3}),
    "ZeRO 0 × 2": (2, {"zero_stage": 0}),
    "offload": (2, {"zero_stage": 1, "offload": "optimizer"}),
    "tensor 2 pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2 context 2 ZeRO 3": (4, {"tensor": 2, "context": 2, "zero_stage": 3}),
}
QUICK = [
    ("tensor 2 context 2 ZeRO 3", "tensor 4"), ("tensor 2 context 2 ZeRO 3", "one"),
    ("interleaved", "ZeRO 2 × 2"), ("interleaved", "tensor 2 pipeline 2"),
    ("offload", "split [3, 1]"), ("offload", "data 4"),
    ("ZeRO 0 × 2", "context 2"), ("ZeRO 0 × 2", "ZeRO 3 × 4"),
]  # fmt: skip
BEFORE, AFTER, BOUND = 3, 10, 1e-4


def config_of(layout: str, folder: Path, run_dir: Path) -> Config:
    """Of a run on the campaign's data."""
    return parse_config(
        {
            "model": MODEL | {"num_kv_heads": 4, "ssd_groups": 4},
            "parallel": LAYOUTS[layout][1],
            "data": {"train": str(folder / "data/train"), "seq_len": 64},
            "optimizer": {"lr": 1e-3, "eps": 1e-5},
            "training": {"steps": BEFORE + AFTER, "global_batch_size": 8, "micro_batch_size": 1,
                         "dtype": "fp32", "eval_every": 0},
            "logging": {"run_dir": str(run_dir), "tensorboard": False},
        }
    )  # fmt: skip


def go_on(config: Config, source: Path | None) -> list[float]:
    """Make BEFORE steps, or load `source`; save; the losses of the steps after."""
    trainer = open_trainer(config)
    if source is not None:
        trainer.resume(source)
    batches = trainer.batches()
    if source is None:
        for _ in range(BEFORE):
            trainer.train_step(batches)
    trainer.save()
    losses = []
    for _ in range(config.training.steps - BEFORE):
        trainer.saver.poll()
        losses.append(trainer.train_step(batches)["loss"])
    trainer.saver.drain()
    batches.close()
    return losses


@dataclass(frozen=True)
class Written:
    """A layout's checkpoint, what it holds, and how training went on."""

    step_dir: Path
    losses: list[float]
    tensors: dict[str, Tensor]


def stored_tensors(step_dir: Path, *, random: bool = False) -> dict[str, Tensor]:
    """Return every weight and moment, whole, as the safetensors library reads the pieces.

    random: the states of random numbers, too. Values that no piece holds are NaN.
    """
    pieces: dict[str, list[tuple[list[tuple[int, int]], Tensor]]] = {}
    for path in sorted(step_dir.glob("rank-*.safetensors")):
        for key, values in load_file(path).items():
            name, _, ranges = key.removesuffix("]").partition("[")
            box = [(int(a), int(b)) for a, b in (r.split(":") for r in ranges.split(","))]
            if random or not name.startswith("rng."):
                pieces.setdefault(name, []).append((box, values))
    tensors = {}
    for name, parts in pieces.items():
        shape = [
            max(stops) for stops in zip(*([b for _, b in box] for box, _ in parts), strict=True)
        ]
        whole = torch.full(shape, float("nan")).to(parts[0][1].dtype)
        for box, values in parts:
            whole[tuple(slice(a, b) for a, b in box)] = values
        tensors[name] = whole
    return tensors


def write(layout: str, folder: Path) -> Written:
    """Train and save under a layout."""
    run_dir = folder / "written" / layout
    losses = run_ranks(LAYOUTS[layout][0], go_on, config_of(layout, folder, run_dir), None)[0]
    step_dir = run_dir / f"checkpoints/step-{BEFORE:08d}"
    return Written(step_dir, losses, stored_tensors(step_dir))


def read(source: Written, layout: str, folder: Path, same: bool) -> dict[str, Any]:
    """Go on from a checkpoint under a layout: {error, bits, bad}."""
    run_dir = folder / "read"
    shutil.rmtree(run_dir, ignore_errors=True)
    config = config_of(layout, folder, run_dir)
    losses = run_ranks(LAYOUTS[layout][0], go_on, config, source.step_dir)[0]
    error = max(abs(a / b - 1) for a, b in zip(losses, source.losses, strict=True))
    again = run_dir / f"checkpoints/step-{BEFORE:08d}"
    tensors, counters = stored_tensors(again), ("step", "samples", "tokens", "adam_step")
    there, here = read_manifest(source.step_dir), read_manifest(again)
    bits = tensors.keys() == source.tensors.keys() and all(
        torch.equal(tensor, source.tensors[name]) for name, tensor in tensors.items()
    )
    bits = bits and all(there[name] == here[name] for name in counters)
    met = bits and (losses == source.losses if same else error <= BOUND)
    return {"error": error, "bits": bits, "bad": not met}


def campaign(pairs: list[tuple[str, str]], record: Path, console: Console) -> list[dict[str, Any]]:
    """All pairs that the record does not have yet, and those it has."""
    lines = record.read_text().splitlines() if record.exists() else []
    results = [json.loads(line) for line in lines]
    known = {(result["wrote"], result["reads"]) for result in results}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        for wrote in dict.fromkeys(wrote for wrote, _ in pairs):
            left = [reads for w, reads in pairs if w == wrote and (w, reads) not in known]
            if not left:
                continue
            source = write(wrote, folder)
            for reads in left:
                found = read(source, reads, folder, wrote == reads)
                results.append({"wrote": wrote, "reads": reads} | found)
                with record.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                console.print(f"{wrote} → {reads}: {found['error']:.1e}", style="dim")
            shutil.rmtree(folder / "written" / wrote)
    wanted = set(pairs)
    return [result for result in results if (result["wrote"], result["reads"]) in wanted]


def report(results: list[dict[str, Any]], console: Console) -> int:
    """Print what each layout's readers met; 1 if a pair is bad."""
    table = Table("written by", "read by", "worst of losses", "under itself", "bits kept", "bad")
    for wrote in dict.fromkeys(result["wrote"] for result in results):
        of = [result for result in results if result["wrote"] == wrote]
        own = [result["error"] for result in of if result["reads"] == wrote]
        worst = max(result["error"] for result in of)
        kept = f"{sum(result['bits'] for result in of)} of {len(of)}"
        bad = [result["reads"] for result in of if result["bad"]]
        own_said = "the same digits" if own == [0.0] else "".join(map(str, own))
        said = (wrote, str(len(of)), f"{worst:.1e}", own_said, kept, ", ".join(bad) or "none")
        table.add_row(*said)
    console.print(table)
    bad_pairs = sum(result["bad"] for result in results)
    console.print(f"{len(results) - bad_pairs} of {len(results)} pairs met")
    return 1 if bad_pairs or not results else 0


def main(arguments: list[str]) -> int:
    """Run, or go on with, the campaign; the exit code."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    parser = argparse.ArgumentParser("python -m benchmarks.checkpoint_layouts")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} pairs")
    parser.add_argument("--only", nargs="+", default=list(LAYOUTS), help="layouts that write")
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint_layouts"))
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.only) - LAYOUTS.keys()):
        parser.error(f"--only: {unknown}; expected some of {list(LAYOUTS)}")
    pairs = QUICK if options.quick else [(w, r) for w in options.only for r in LAYOUTS]
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False, width=110)
    return report(campaign(pairs, options.out / "results.jsonl", console), console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
