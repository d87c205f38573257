"""How long training waits for a checkpoint: saved at once, and beside the next steps.

    python -m benchmarks.checkpoint_stall [--quick] [--ranks 1] [--repeats 5]

A model of 108 million parameters (--quick: 29) makes steps of a few tokens on CPU processes and is
saved in turns: at once, when training waits until the checkpoint is committed, and beside training,
when it waits for the call to return and, if the copy is not made by then, before the next update.
Medians over repeats in one run. Exits with 1 when the second is not below 10 % of the first.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoint_faults import make_data
from benchmarks.ranks import run_ranks
from benchmarks.trainers import open_trainer
from pretrain.config import Config, parse_config

BOUND = 0.1
SIZES = {False: (768, 8, 60_000), True: (512, 4, 30_000)}  # hidden, layers, vocabulary


def config_of(folder: Path, quick: bool) -> Config:
    """Of a run on made-up text."""
    hidden, layers, vocabulary = SIZES[quick]
    return parse_config(
        {
            "model": {"vocab_size": vocabulary, "hidden_size": hidden,
                      "intermediate_size": 3 * hidden, "num_layers": layers,
                      "num_heads": hidden // 64, "num_kv_heads": hidden // 64,
                      "ssd_groups": hidden // 64},
            "data": {"train": str(folder / "data/train"), "seq_len": 64},
            "training": {"steps": 1000, "global_batch_size": 4, "micro_batch_size": 1,
                         "dtype": "fp32", "eval_every": 0},
            "checkpoint": {"keep_last": 1},
            "logging": {"run_dir": str(folder / "run"), "tensorboard": False},
        }
    )  # fmt: skip


def measure(config: Config, repeats: int) -> dict[str, float]:
    """Medians, in seconds: a step, a save at once, what training waited for one beside it, such a
    step, and until it was committed."""
    trainer = open_trainer(config)
    batches = trainer.batches()
    found: dict[str, list[float]] = {}

    def timed(name: str, begin: float) -> None:
        found.setdefault(name, []).append(time.perf_counter() - begin)

    for turn in range(repeats + 1):  # the first allocates
        begin = time.perf_counter()
        trainer.train_step(batches)
        timed("step", begin)
        trainer.saver.asynchronous = False
        begin = time.perf_counter()
        trainer.save()
        timed("at once", begin)
        trainer.train_step(batches)
        trainer.saver.take_stall()
        trainer.saver.asynchronous = True
        begin = time.perf_counter()
        trainer.save()
        after = time.perf_counter()
        metrics = trainer.train_step(batches)
        timed("step beside", after)
        found.setdefault("beside", []).append(metrics["time_checkpoint"])
        while trainer.saver._flight is not None:
            trainer.saver.poll()
            trainer.train_step(batches)
        timed("committed", begin)
        if not turn:
            found = {}
    batches.close()
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main(arguments: list[str]) -> int:
    """Print the table; the exit code."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    parser = argparse.ArgumentParser("python -m benchmarks.checkpoint_stall")
    parser.add_argument("--quick", action="store_true", help="a smaller model, 3 repeats")
    parser.add_argument("--ranks", type=int, default=1, help="[1]")
    parser.add_argument("--repeats", type=int, default=5, help="[5]")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        config = config_of(folder, options.quick)
        repeats = 3 if options.quick else options.repeats
        found = run_ranks(options.ranks, measure, config, repeats)[0]
    parameters = config.model.num_params()["total"]
    console = Console(highlight=False, markup=False, width=110)
    table = Table(
        "", "seconds", title=f"{parameters / 1e6:.0f} M parameters, {options.ranks} rank(s)"
    )
    table.add_row("saved at once: training waits", f"{found['at once']:.3f}")
    table.add_row("saved beside training: it waits", f"{found['beside']:.3f}")
    table.add_row("… until it is committed", f"{found['committed']:.3f}")
    table.add_row("a step", f"{found['step']:.3f}")
    table.add_row("… while its state is copied and written", f"{found['step beside']:.3f}")
    console.print(table)
    ratio = found["beside"] / found["at once"]
    verdict = "met" if ratio < BOUND else "MISSED"
    console.print(f"training waits {ratio:.1%} as long (bound {BOUND:.0%}): {verdict}")
    return 0 if ratio < BOUND else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
