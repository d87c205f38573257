"""A run whose record says that steps were made, and whose checkpoints are gone, does not begin
again in silence: its first step would erase the record.

checkpoints.json in the run directory tells where the checkpoints are and how far they reach. It
distinguishes a run that has lost them (the folder was removed, is not mounted, or checkpoint.dir
was edited) from one that ended before its first checkpoint, whose steps are made again.
"""

import json
import logging
from pathlib import Path

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.folder import committed_steps
from pretrain.bad_steps import EVENTS, WINDOWS
from pretrain.config import Config
from pretrain.records import METRICS, SAVES, Saves
from untrusted.errors import UntrustedError
from untrusted.files import replace_file
from untrusted.records import read_json, read_json_lines

log = logging.getLogger("transxssm")

FILE = "checkpoints.json"
RECORD = (
    "config.toml", "environment.json", "metrics.jsonl", "tensorboard", EVENTS, WINDOWS, FILE,
)  # fmt: skip
"""What is set aside; logs stay, one of them is being written."""


def keep_record(config: Config, steps: list[int]) -> None:
    """Refuse a start from other checkpoints than those on record. Rank 0 only.

    steps: those with a checkpoint in checkpoint.dir. With checkpoint.begin_again the record is set
    aside instead. Raises CheckpointError and OSError.
    """
    run_dir, folder = Path(config.logging.run_dir), config.checkpoint_dir
    saves = _read_saves(run_dir)
    moved = saves is not None and Path(saves["folder"]) != folder.absolute()
    if steps and not (saves and moved and steps[-1] < saves["step"]):
        return
    lines = read_json_lines(run_dir / "metrics.jsonl", METRICS)
    made = max([line["step"] for line in lines.entries] + [saves["step"] if saves else 0])
    if not steps and not made and not lines.faults:
        return
    if not steps and saves is not None and not saves["step"]:
        log.warning("no checkpoint was saved: the %d steps on record are made again", made)
        return
    if config.checkpoint.begin_again:
        log.warning("the record of %d steps is now in %s", made, _set_aside(run_dir))
        return
    before = f", saved to {saves['folder']}" if saves and moved else ""
    there = f"holds checkpoints up to step {steps[-1]} only" if steps else "holds no checkpoint"
    raise CheckpointError(
        f"{run_dir} is the record of a run of {made or 'an unknown number of'} steps{before}, but "
        f"checkpoint.dir {folder} {there}: it was removed, is not mounted, or checkpoint.dir was "
        "changed. Restore it, or choose another logging.run_dir; or begin again, with this record "
        "set aside, by --checkpoint.begin_again true"
    )


def record_saves(config: Config, step: int | None = None) -> None:
    """Record where the run's checkpoints are: up to `step` [those that are there]. Rank 0 only.

    Where it cannot be written the run goes on without it.
    """
    folder, path = config.checkpoint_dir, Path(config.logging.run_dir) / FILE
    try:
        newest = max(committed_steps(folder), default=0) if step is None else step
        saves = Saves(folder=str(folder.absolute()), step=newest)
        replace_file(path, json.dumps(saves).encode())
    except OSError as error:
        log.warning("%s cannot be written (%s): training goes on", path, error)


def _read_saves(run_dir: Path) -> Saves | None:
    try:
        return read_json(run_dir / FILE, SAVES, "it is written again")
    except FileNotFoundError:
        return None
    except UntrustedError as error:
        log.warning("%s", error)
        return None


def _set_aside(run_dir: Path) -> Path:
    """Move the files of the record to a new folder of the run directory."""
    number = 1
    while (aside := run_dir / f"old-record-{number}").exists():
        number += 1
    aside.mkdir()
    for name in RECORD:
        if (run_dir / name).exists():
            (run_dir / name).rename(aside / name)
    return aside
