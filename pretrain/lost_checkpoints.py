"""A run whose record says that steps were made, and whose checkpoints are gone, does not begin
again in silence: its first step would erase the record.

checkpoints.json in the run directory tells where the checkpoints are and how far they reach. It
distinguishes a run that has lost them (the folder or its newest steps were removed, it is not
mounted, or checkpoint.dir was edited) from one that ended before its first checkpoint, whose steps
are made again.
"""

import json
import logging
import shutil
from pathlib import Path

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.folder import SAVES, SAVES_FILE, Saves, committed_steps, step_folder
from pretrain.bad_steps import EVENTS, WINDOWS
from pretrain.config import Config
from pretrain.records import METRICS
from untrusted.errors import UntrustedError
from untrusted.files import write_durably
from untrusted.records import read_json_lines, read_state

log = logging.getLogger("transxssm")

RECORD = (
    "config.toml", "environment.json", "metrics.jsonl", "tensorboard", EVENTS, WINDOWS, SAVES_FILE,
)  # fmt: skip
"""What is set aside; logs stay, one of them is being written."""


def keep_record(config: Config, steps: list[int]) -> None:
    """Refuse a start from other checkpoints than those on record. Rank 0 only.

    steps: those with a checkpoint in checkpoint.dir, damaged or not. With checkpoint.begin_again
    the record is set aside instead; a run that goes on from an older step keeps a copy, as does
    one whose checkpoint.resume names that step. Raises CheckpointError and OSError.
    """
    run_dir, folder = Path(config.logging.run_dir), config.checkpoint_dir
    saves = _read_saves(run_dir)
    moved = saves is not None and Path(saves["folder"]) != folder.absolute()
    if steps and not (saves and steps[-1] < saves["step"]):
        return
    lines = read_json_lines(run_dir / "metrics.jsonl", METRICS)
    made = max([line["step"] for line in lines.entries] + [saves["step"] if saves else 0])
    if not steps and not made and not lines.faults:
        return
    if not steps and saves is not None and not saves["step"]:
        log.warning("no checkpoint was saved: the %d steps on record are made again", made)
        return
    goes_back = bool(steps) and not moved
    named = goes_back and _is_named(config, step_folder(folder, steps[-1]))
    if config.checkpoint.begin_again or named:
        aside = _set_aside(run_dir, copied=goes_back)
        before = f"going on from step {steps[-1]}: a copy of " if goes_back else ""
        log.warning("%sthe record of %d steps is now in %s", before, made, aside)
        return
    before = ""
    if saves and saves["step"]:
        before = f", saved up to step {saves['step']}" + (f" to {saves['folder']}" if moved else "")
    there = f"holds checkpoints up to step {steps[-1]} only" if steps else "holds no checkpoint"
    lost = "it was removed, is not mounted, or checkpoint.dir was changed. Restore it"
    again = "begin again, with this record set aside"
    if goes_back:
        lost = "later ones were removed. Restore them"
        again = f"go on from step {steps[-1]}, with a copy of this record set aside"
    raise CheckpointError(
        f"{run_dir} is the record of a run of {made or 'an unknown number of'} steps{before}, but "
        f"checkpoint.dir {folder} {there}: {lost}, or choose another logging.run_dir; or {again}, "
        "by --checkpoint.begin_again true"
    )


def record_saves(config: Config, step: int | None = None, *, last_step: int | None = None) -> None:
    """Record where the run's checkpoints are: up to `step` [those that are there]. Rank 0 only.

    last_step: the newest step that will stay, before later ones are removed. Where the record
    cannot be written the run goes on without it.
    """
    folder, path = config.checkpoint_dir, Path(config.logging.run_dir) / SAVES_FILE
    try:
        if step is None:
            steps = committed_steps(folder)
            step = max((s for s in steps if last_step is None or s <= last_step), default=0)
        saves = Saves(folder=str(folder.absolute()), step=step)
        write_durably(path, json.dumps(saves).encode())
    except OSError as error:
        log.warning("%s cannot be written (%s): training goes on", path, error)


def _read_saves(run_dir: Path) -> Saves | None:
    try:
        return read_state(run_dir / SAVES_FILE, SAVES, "it is written again")
    except UntrustedError as error:
        log.warning("%s", error)
        return None


def _is_named(config: Config, newest: Path) -> bool:
    """Whether checkpoint.resume names this very step: later ones were moved away to go back."""
    return Path(config.checkpoint.resume).resolve() == newest.resolve()


def _set_aside(run_dir: Path, *, copied: bool) -> Path:
    """Move or copy the files of the record to a new folder of the run directory."""
    number = 1
    while (aside := run_dir / f"old-record-{number}").exists():
        number += 1
    aside.mkdir()
    for name in RECORD:
        path = run_dir / name
        if not path.exists():
            continue
        if not copied:
            path.rename(aside / name)
        elif path.is_dir():
            shutil.copytree(path, aside / name, symlinks=True)
        else:
            shutil.copyfile(path, aside / name, follow_symlinks=False)
    return aside
