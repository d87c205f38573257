"""Runs that die, or meet a fault, while they save: does the next start go on from the right place?

    python -m benchmarks.checkpoint_faults [--runs 200] [--quick] [--out runs/checkpoint_faults]

Every run is a tiny job of 1 to 4 ranks that goes on from a sound checkpoint of step 2 and saves
every other step, beside training. A fault befalls it, chosen with its moment by the run's number:

- one rank, or all, SIGKILLed at a random instant between the call of a save and a little after its
  commit (in an eighth of the runs, the saves are synchronous)
- the disk is full (a small tmpfs), or a write, an fsync or a rename fails, on a random rank
- a file of the newest checkpoint is cut, changed by a bit, exchanged with another's, or missing, or
  the folder cannot be read

Then the same command is started again. It must end with 0, go on from the newest step whose files
are what its manifest says (checked here, apart from the program), name what it passed over, and end
with the curve of the uninterrupted run, digit for digit. No rank may hang.

Results are kept in --out, and a campaign that was stopped goes on. Exits with 1 if any run is bad.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from benchmarks.command import Ended, read_metrics, run_command

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, ["--training.cuda_graphs=on"]),
    "data 2": (2, []),
    "tensor 2": (2, ["--parallel.tensor=2", "--training.cuda_graphs=on"]),
    "ZeRO 3 × 2": (2, ["--parallel.zero_stage=3"]),
    "pipeline 2": (2, ["--parallel.pipeline=2"]),
    "tensor 2 × data 2": (4, ["--parallel.tensor=2"]),
}
KILLS = ("kill one", "kill all")
FAILURES = ("disk full", "write fails", "fsync fails", "rename fails")
DAMAGES = ("cut", "bit", "exchanged", "missing", "manifest missing", "unreadable")
STEPS, EVERY, FIRST, HANG = 8, 2, 2, 120.0
WINDOW = 0.6  # seconds from the call of a save in which a kill falls
MODEL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 8, "state_dim": 16, "ssd_groups": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1,
}  # fmt: skip
EXACT = ("step", "tokens", "samples", "loss", "grad_norm", "lr")


# -- in the ranks ----------------------------------------------------------------------------------


def stop_after_first_save() -> None:
    """End every rank by SIGKILL once the checkpoint of step FIRST is committed."""
    _after_save(FIRST, lambda: os.kill(os.getpid(), signal.SIGKILL), wait=True)


def kill_in_save(step: int, delay: float, victim: int | None) -> None:
    """SIGKILL `victim` (None: every rank) `delay` seconds after it begins to save a step."""
    if victim not in (None, int(os.environ.get("RANK", "0"))):
        return
    timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL))
    from pretrain.trainer import Trainer

    save, step_of = Trainer.save, Trainer.train_step

    def fatal(trainer: Any) -> None:
        if trainer.step == step:
            timer.start()
        save(trainer)

    def slow(trainer: Any, batches: Any) -> dict[str, Any] | None:
        if trainer.step >= step:
            time.sleep(0.1)  # so that the window lies within the run
        return step_of(trainer, batches)

    Trainer.save, Trainer.train_step = fatal, slow  # type: ignore[assignment,method-assign]


def fail_in_save(step: int, what: str, victim: int, calls: int) -> None:
    """On rank `victim`, one of the system calls of a step's save fails."""
    if victim != int(os.environ.get("RANK", "0")):
        return

    def arm() -> None:
        left = [calls]

        def failing(call: Callable[..., Any]) -> Callable[..., Any]:
            def maybe(*arguments: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return call(*arguments, **named)

            return maybe

        if what == "fsync fails":
            os.fsync = failing(os.fsync)
        elif what == "rename fails":
            Path.rename = failing(Path.rename)  # type: ignore[method-assign]
        else:
            from checkpoints_tools import pieces_file

            pieces_file.write_block = failing(pieces_file.write_block)

    from pretrain.trainer import Trainer

    save = Trainer.save

    def fragile(trainer: Any) -> None:
        if trainer.step == step:
            arm()
        save(trainer)

    Trainer.save = fragile  # type: ignore[assignment,method-assign]


def fill_disk(step: int, disk: str, free: int) -> None:
    """The disk has `free` bytes left when a step is saved."""

    def fill() -> None:
        if os.environ.get("RANK", "0") == "0":
            available = os.statvfs(disk)
            filler = bytes(max(0, available.f_bavail * available.f_frsize - free))
            (Path(disk) / "filler").write_bytes(filler)

    _after_save(step, fill, wait=True)


def become_nobody() -> None:
    """Of root's processes, whom no file mode stops."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.environ["PATH"] = "/usr/bin:/bin"  # root's may have folders of root's alone


def _after_save(step: int, action: Callable[[], None], wait: bool) -> None:
    from pretrain.trainer import Trainer

    save = Trainer.save

    def then(trainer: Any) -> None:
        save(trainer)
        if trainer.step == step:
            if wait:
                trainer.saver.drain()
            action()

    Trainer.save = then  # type: ignore[assignment,method-assign]


# -- around them -----------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Shards of made-up text."""
    from data_pipeline.prepare import prepare
    from data_pipeline.tokenizer import train_tokenizer

    random_ = np.random.default_rng(0)
    (folder / "text").mkdir(parents=True)
    words = [f"w{n:x}" for n in range(300)]
    for n in range(40):
        (folder / f"text/{n:02d}.txt").write_text(" ".join(random_.choice(words, 300)))
    texts: list[Path | str] = [folder / "text"]
    train_tokenizer(texts, folder / "tokenizer", 300)
    prepare(texts, folder / "tokenizer", folder / "data", 64, validation_fraction=0)


def write_config(path: Path, data: Path) -> None:
    from pretrain.config import dump_config, parse_config

    tree = {
        "model": MODEL,
        "data": {"train": str(data / "train"), "seq_len": 64},
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "training": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1,
                     "dtype": "fp32", "eval_every": 0},
        "checkpoint": {"every": EVERY, "keep_last": 3},
        "logging": {"run_dir": str(path.parent / "run"), "tensorboard": False},
    }  # fmt: skip
    path.write_text(dump_config(parse_config(tree)))


def is_sound(step_dir: Path) -> bool:
    """Whether a checkpoint's files are what its manifest says; written apart from the program."""
    try:
        files = json.loads((step_dir / "manifest.json").read_text())["files"]
        return all(
            xxhash.xxh64((step_dir / name).read_bytes()).hexdigest() == entry["xxh64"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def steps_of(checkpoints: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in checkpoints.glob("step-????????") if p.is_dir())


def damage(step_dir: Path, how: str, choice: random.Random) -> str:
    """Damage a checkpoint; the file's name."""
    files = sorted(p for p in step_dir.iterdir() if p.name != "manifest.json" and p.stat().st_size)
    file = choice.choice(files)
    content = bytearray(file.read_bytes())
    if how == "cut":
        os.truncate(file, choice.randrange(len(content)))
    elif how == "bit":
        content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    elif how == "manifest missing":
        file = step_dir / "manifest.json"
        file.unlink()
    elif how == "exchanged":
        other = choice.choice([p for p in files if p != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        step_dir.chmod(0)
    return file.name


class Campaign:
    """Data and, once a layout is wanted, its uninterrupted curve, and a run of it that ended after
    its first save; below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_data(folder)
        self.curves: dict[str, list[dict[str, Any]]] = {}

    def prepare(self, layout: str) -> None:
        """Make a layout's curve, and begun/LAYOUT, unless they are there."""
        if layout in self.curves:
            return
        ranks, options = LAYOUTS[layout]
        whole = self.start(f"whole/{layout}", None)
        expect_end(self.run(whole, ranks, options), whole)
        self.curves[layout] = curve(whole)
        begun = self.start(f"begun/{layout}", None)
        expect_end(self.run(begun, ranks, options, before=stop_after_first_save), begun)

    def start(self, name: str, source: str | None) -> Path:
        """A run's folder, new or a copy of another's."""
        folder = self.folder / name
        if source is not None:
            shutil.copytree(self.folder / source, folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / "config.toml", self.folder / "data")
        return folder

    def run(self, folder: Path, ranks: int, options: list[str], **how: Any) -> list[Ended]:
        how = {"kill_after": HANG} | how
        return run_command("pretrain", folder / "config.toml", *options, ranks=ranks, **how)


def expect_end(ends: list[Ended], folder: Path) -> None:
    """Raise RuntimeError, with what each rank said last, unless all ended, or were killed, as they
    were to."""
    if any(e.code not in (0, -signal.SIGKILL) or e.seconds >= HANG for e in ends):
        said = [f"rank {r}: {e.code} after {e.seconds:.0f} s: {e.output[-2000:]}"
                for r, e in enumerate(ends)]  # fmt: skip
        raise RuntimeError(f"{folder}, which meets no fault yet, failed\n" + "\n".join(said))


def curve(folder: Path) -> list[dict[str, Any]]:
    return [{name: m[name] for name in EXACT} for m in read_metrics(folder / "run")]


def one_run(campaign: Campaign, number: int, kind: str) -> dict[str, Any]:
    """What became of a run: {kind, layout, resumed, newest, bad}; bad: what is wrong, or empty."""
    choice = random.Random(number)
    layout = choice.choice(list(LAYOUTS))
    ranks, options = LAYOUTS[layout]
    options = [*options]
    if choice.random() < 0.125:
        options.append("--checkpoint.async_save=false")
    campaign.prepare(layout)
    folder = campaign.start(f"runs/{number}", f"begun/{layout}")
    checkpoints = folder / "run/checkpoints"
    step, victim = choice.choice([4, 6]), choice.randrange(ranks)
    faults: list[str] = []
    skipped = ""
    again: dict[str, Any] = {}
    if kind in KILLS:
        one = victim if kind == "kill one" else None
        before = partial(kill_in_save, step, choice.uniform(0, WINDOW), one)
        ends = campaign.run(folder, ranks, options, before=before)
        for rank, end in enumerate(ends):
            killed = end.code == -signal.SIGKILL and end.seconds < HANG
            if not (killed and (one is None or rank == one)) and end.code not in (0, 1):
                faults.append(f"rank {rank} ended with {end.code} after {end.seconds:.0f} s")
    elif kind in FAILURES:
        if kind == "disk full":
            disk = folder / "disk"
            disk.mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True
            )
            shutil.move(checkpoints, disk / "checkpoints")
            checkpoints = disk / "checkpoints"
            options.append(f"--checkpoint.dir={checkpoints}")
            free = choice.choice([0, 9000, 100_000, 300_000])
            before = partial(fill_disk, step - EVERY, str(disk), free)
            if step == 4:  # the save of step 2 is in the folder that the run starts from
                (disk / "filler").write_bytes(bytes(1))
                before = partial(fill_disk_at_start, str(disk), free)
        else:
            calls = choice.randrange(1, 4)
            before = partial(fail_in_save, step, kind, victim, calls)
        ends = campaign.run(folder, ranks, options, before=before)
        failed = [end for end in ends if end.code]
        if failed and (len(failed) < ranks or any(end.code != 1 for end in ends)):
            faults.append(f"ranks ended with {[end.code for end in ends]}")
        if failed and not all("error: " in end.output for end in ends):
            faults.append("a rank says nothing")
        if kind == "disk full":
            (checkpoints.parent / "filler").unlink(missing_ok=True)
    else:
        expect_end(campaign.run(folder, ranks, options, before=partial(stop_at, step)), folder)
        newest = checkpoints / f"step-{step:08d}"
        skipped = damage(newest, kind, choice)
        if kind == "unreadable":
            skipped = newest.name
            for path in [folder, *folder.rglob("*")]:
                if path != newest and newest not in path.parents:
                    path.chmod(0o777)
            again["before"] = become_nobody
    sound = [s for s in steps_of(checkpoints) if is_sound(checkpoints / f"step-{s:08d}")]
    if kind == "unreadable":  # by those who start the run
        sound.remove(step)
    newest_step = steps_of(checkpoints)[-1]
    ends = campaign.run(folder, ranks, options, **again)
    said = ends[0].output
    if any(end.code for end in ends):
        faults.append(f"the next start ended with {[end.code for end in ends]}: {said[-300:]}")
    expected = f"step-{sound[-1]:08d}"
    if sound[-1] < STEPS and f"resumed from {checkpoints / expected}" not in said:
        faults.append(f"it did not go on from {expected}: {said[-300:]}")
    if skipped and (skipped not in said or "SKIPPING" not in said):
        faults.append(f"it did not name {skipped}: {said[-300:]}")
    if not faults and curve(folder) != campaign.curves[layout]:
        faults.append("its curve is not that of the uninterrupted run")
    if kind == "disk full":
        subprocess.run(["umount", "--lazy", str(checkpoints.parent)], check=True)
    if not faults:
        shutil.rmtree(folder, ignore_errors=True)
    back = newest_step - sound[-1]
    return {"number": number, "kind": kind, "layout": layout, "from": sound[-1], "back": back,
            "step": step, "bad": "; ".join(faults)}  # fmt: skip


def fill_disk_at_start(disk: str, free: int) -> None:
    """As fill_disk, before the run begins."""
    available = os.statvfs(disk)
    if os.environ.get("RANK", "0") == "0":
        filler = bytes(max(0, available.f_bavail * available.f_frsize - free))
        (Path(disk) / "filler").write_bytes(filler)


def stop_at(step: int) -> None:
    """End every rank by SIGKILL once the checkpoint of a step is committed."""
    _after_save(step, lambda: os.kill(os.getpid(), signal.SIGKILL), wait=True)


def kinds(runs: int) -> list[str]:
    """Of all runs: half are killed, the others meet each fault in turn."""
    can_mount = os.geteuid() == 0 and shutil.which("mount") is not None
    others = [k for k in (*FAILURES, *DAMAGES) if can_mount or k != "disk full"]
    return [
        KILLS[number // 2 % 2] if number % 2 == 0 else others[number // 2 % len(others)]
        for number in range(runs)
    ]


def report(results: list[dict[str, Any]], console: Console) -> int:
    """Print the table; 1 if a run is bad."""
    table = Table("fault", "runs", "from the save that met it", "from the one before", "bad")
    for kind in (*KILLS, *FAILURES, *DAMAGES):
        of = [r for r in results if r["kind"] == kind]
        if of:
            counts = Counter(r["from"] >= r["step"] for r in of)
            bad = sum(bool(r["bad"]) for r in of)
            table.add_row(kind, str(len(of)), str(counts[True]), str(counts[False]), str(bad))
    console.print(table)
    failed = [r for r in results if r["bad"]]
    for result in failed:
        console.print(f"run {result['number']} ({result['kind']}, {result['layout']}): "
                      f"{result['bad']}", style="red")  # fmt: skip
    console.print(f"{len(results) - len(failed)} of {len(results)} runs went on as they must")
    return 1 if failed or not results else 0


def main(arguments: list[str]) -> int:
    """Run, or go on with, the campaign; the exit code."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    parser = argparse.ArgumentParser("python -m benchmarks.checkpoint_faults")
    parser.add_argument("--runs", type=int, default=200, help="[200]")
    parser.add_argument("--quick", action="store_true", help="22 runs")
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint_faults"))
    options = parser.parse_args(arguments)
    wanted = kinds(22 if options.quick else options.runs)
    console = Console(highlight=False, markup=False, width=110)
    options.out.mkdir(parents=True, exist_ok=True)
    revision = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    record = options.out / f"results-{revision}.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    results = [json.loads(line) for line in lines][: len(wanted)]
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        campaign = Campaign(Path(name))
        for number in range(len(results), len(wanted)):
            result = one_run(campaign, number, wanted[number])
            results.append(result)
            with record.open("a") as file:
                file.write(json.dumps(result) + "\n")
            verdict = result["bad"] or f"from step {result['from']}"
            console.print(f"{number + 1}/{len(wanted)} {result['kind']}, {result['layout']}: "
                          f"{verdict}", style="dim")  # fmt: skip
    return report(results, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
