"""How well TransXSSM and its rivals learn from equal tokens: the paper's Table 2 in small.

    python -m benchmarks.quality [--seeds 3] [--steps 250] [--rivals all] [--folder runs/quality]
        [--processes 2] [--quick]

Every rival has as many parameters (benchmarks.rivals) and reads the same tokens of real text (this
Python's standard library) in an order of its seed's, which also gives the first weights. Printed is
the loss on held-out text, its mean over seeds with a 95 % confidence interval (Student's t), and
the difference from TransXSSM, seed by seed.

Runs that have ended are remembered in the folder: run it again after a kill. Exits with 1 when a
run fails, whichever rival is better.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.command import read_metrics, run_command
from benchmarks.rivals import DECAY_ALONE, RIVALS, TRANSXSSM, Rival, rival_model
from data_pipeline.demo import demo_corpus
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from parallel.config import ModelConfig
from pretrain.config import Config, dump_config, parse_config

SEQ_LEN, BATCH, VOCABULARY = 512, 8, 4096
LIMIT_SECONDS = 3 * 3600.0  # of a run
# Student's t, 97.5 %, by degrees of freedom
T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# the paper's question first: where positions come from, and which layers
CHOSEN = (TRANSXSSM, RIVALS[1], RIVALS[2], RIVALS[4], DECAY_ALONE)
ALL = (*RIVALS, DECAY_ALONE)
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    state_dim=32,
    ssd_groups=4,
    max_position_embeddings=SEQ_LEN,
)


@dataclass(frozen=True)
class Run:
    """One training."""

    rival: Rival
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, and of what is remembered."""
        words = "".join(c if c.isalnum() else " " for c in self.rival.name).split()
        return f"{'-'.join(words)}-{self.seed}".lower()


def configuration(run: Run, folder: Path, steps: int) -> Config:
    """Of a run; evaluated on all held-out text at its end."""
    return parse_config(
        {
            "model": rival_model(run.rival, MODEL).model_dump(),
            "data": {
                "train": str(folder / "data/train"),
                "validation": str(folder / "data/validation"),
                "seq_len": SEQ_LEN,
                "seed": run.seed,
            },
            "optimizer": {"lr": 3e-3, "warmup_fraction": 0.1},
            "training": {
                "steps": steps,
                "global_batch_size": BATCH,
                "micro_batch_size": BATCH,
                "dtype": "fp32",
                "seed": run.seed,
                "eval_every": steps,
                "eval_batches": 1_000_000,
            },
            "checkpoint": {"every": max(1, steps // 4), "keep_last": 1},
            "logging": {
                "run_dir": str(folder / run.name),
                "tensorboard": False,
                "every": 50,
                "vitals_every": 0,
            },
        }
    )


def prepare_data(folder: Path) -> None:
    """Tokenizer and shards, unless they are there."""
    if (folder / "data/validation").is_dir():
        return
    corpus = demo_corpus(folder / f"corpus-{os.getpid()}")
    train_tokenizer([corpus.folder], folder / "tokenizer", VOCABULARY)
    prepare(
        [corpus.folder], folder / "tokenizer", folder / "data", SEQ_LEN, validation_fraction=0.03
    )


def train(run: Run, folder: Path, steps: int) -> dict[str, Any]:
    """Losses of a run at its end. Raises RuntimeError when it fails."""
    config = folder / f"{run.name}.toml"
    config.write_text(dump_config(configuration(run, folder, steps)))
    (end,) = run_command("pretrain", config, kill_after=LIMIT_SECONDS)
    if end.code:
        raise RuntimeError(f"{run.name} ended with {end.code}: {end.output[-2000:]}")
    last = read_metrics(folder / run.name)[-1]
    positions = {n: v for n, v in last.items() if n.startswith("validation_loss_from_")}
    return {
        "loss": last["validation_loss"],
        "bits_per_byte": last["validation_bits_per_byte"],
        "tokens": last["tokens"],
        "seconds": end.seconds,
        **positions,
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval; nan of one value."""
    if len(values) < 2:
        return values[0], math.nan
    t = T.get(len(values) - 1, 1.96)
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def campaign(
    rivals: Sequence[Rival], seeds: int, steps: int, folder: Path, processes: int
) -> dict[str, dict[str, Any]]:
    """What all runs came to, by name; `processes` of them at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare_data(folder)
    remembered = folder / f"results-{steps}.json"
    found: dict[str, Any] = json.loads(remembered.read_text()) if remembered.exists() else {}
    # seed by seed, so that a part of the campaign compares all rivals
    runs = [Run(rival, seed) for seed in range(1, seeds + 1) for rival in rivals]
    missing = [run for run in runs if run.name not in found]
    steps_folder = folder / f"steps-{steps}"
    steps_folder.mkdir(exist_ok=True)
    if not (steps_folder / "data").exists():
        (steps_folder / "data").symlink_to(Path("..") / "data")

    def one(run: Run) -> None:
        result = train(run, steps_folder.resolve(), steps)
        found[run.name] = result
        temporary = remembered.with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(found), indent=1))
        temporary.replace(remembered)
        minutes = result["seconds"] / 60
        done = len([r for r in runs if r.name in found])
        print(
            f"{done} of {len(runs)}: {run.name}, loss {result['loss']:.4f}, {minutes:.1f} minutes",
            file=sys.stderr,
            flush=True,
        )

    with ThreadPoolExecutor(processes) as pool:
        for _ in pool.map(one, missing):
            pass
    return {run.name: found[run.name] for run in runs}


def report(
    rivals: Sequence[Rival], seeds: int, found: dict[str, dict[str, Any]], console: Console
) -> None:
    """The table."""

    def of(rival: Rival, name: str) -> list[float]:
        return [found[Run(rival, seed).name][name] for seed in range(1, seeds + 1)]

    tokens = next(iter(found.values()))["tokens"]
    parameters = MODEL.num_params()["total"]
    table = Table(
        title=f"{parameters / 1e6:.2f} M parameters, {tokens:,} tokens of real text, {seeds} seeds"
    )
    for column in ("", "parameters", "validation loss", "bits per byte", "against TransXSSM"):
        table.add_column(column, justify="left" if not column else "right")
    for rival in rivals:
        loss, half = interval(of(rival, "loss"))
        bits, _ = interval(of(rival, "bits_per_byte"))
        against = ""
        if rival != TRANSXSSM and TRANSXSSM in rivals:
            pairs = zip(of(rival, "loss"), of(TRANSXSSM, "loss"), strict=True)
            difference, width = interval([a - b for a, b in pairs])
            against = f"{difference:+.4f} ± {width:.4f}"
        table.add_row(
            rival.name, f"{rival_model(rival, MODEL).num_params()['total']:,}",
            f"{loss:.4f} ± {half:.4f}", f"{bits:.4f}", against,
        )  # fmt: skip
    console.print(table)


def draw(rivals: Sequence[Rival], seeds: int, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Means with intervals, and the seeds; beside them the loss by position."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for place, rival in enumerate(rivals):
        results = [found[Run(rival, seed).name] for seed in range(1, seeds + 1)]
        losses = [result["loss"] for result in results]
        mean, half = interval(losses)
        color = f"C{place}"
        width = 0.0 if math.isnan(half) else half
        left.errorbar(mean, place, xerr=width, fmt="o", color=color, capsize=4)
        left.plot(losses, [place] * len(losses), "|", color=color, ms=12)
        bins = sorted((int(n.rpartition("_")[2]), n) for n in results[0] if "_from_" in n)
        means = [statistics.mean(result[name] for result in results) for _, name in bins]
        right.plot(range(len(bins)), means, "o-", ms=4, color=color, label=rival.name)
        right.set_xticks(range(len(bins)), [f"{begin:,}" for begin, _ in bins])
    left.set_yticks(range(len(rivals)), [rival.name for rival in rivals])
    left.invert_yaxis()
    left.set_xlabel("validation loss, nats a token (95 % interval)")
    right.set_xlabel("tokens of the document before")
    right.set_ylabel("nats a token")
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Run, print, draw; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.quality")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250, help=f"of {BATCH} × {SEQ_LEN} tokens")
    parser.add_argument("--rivals", choices=("five", "all"), default="five")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--quick", action="store_true", help="2 rivals, 2 seeds, 8 steps")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.steps, given.processes) < 1:
        parser.error("--seeds, --steps and --processes are 1 or more")
    rivals: tuple[Rival, ...] = ALL if given.rivals == "all" else CHOSEN
    seeds, steps = given.seeds, given.steps
    if given.quick:
        rivals, seeds, steps = CHOSEN[:2], 2, 8
    folder: Path = given.folder.resolve()
    try:
        found = campaign(rivals, seeds, steps, folder, given.processes)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console(highlight=False, width=120)
    report(rivals, seeds, found, console)
    draw(rivals, seeds, found, folder / "quality.png")
    console.print(f"picture: {folder / 'quality.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
