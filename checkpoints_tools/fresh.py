"""Making a checkpoint that no training run saved: imported or averaged weights, at step 0."""

import shutil
from math import prod
from pathlib import Path
from typing import Any

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.stored import KINDS
from checkpoints_tools.stored_writer import Reader, write_untrained_state

# Of a run that has not begun.
START: dict[str, Any] = {
    "samples": 0,
    "tokens": 0,
    "skipped_shards": [],
    "adam_step": 0,
    "world_size": 1,
}


def write_fresh_checkpoint(
    out: Path,
    state: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    read: Reader,
    tokenizer: bytes,
) -> Path:
    """OUT/step-00000000 with these weights, moments of zero and START; its folder.

    state: what else the manifest says; shapes and read: of every parameter. Raises CheckpointError
    when `out` is in use or cannot be written; nothing is left there then.
    """
    existed = out.exists()
    if existed and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} exists and is not empty; name a new folder for the checkpoint"
        )
    try:
        temporary = folders.begin(out, 0)
        _check_room(out, shapes)
        folders.write_durably(temporary / "tokenizer.json", tokenizer)
        entries = write_untrained_state(temporary, shapes, read)
        return folders.commit(out, 0, START | state, entries)
    except BaseException as error:
        shutil.rmtree(folders.step_folder(out, 0).with_suffix(".tmp"), ignore_errors=True)
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"writing {out} failed: {error}; nothing is left there"
            ) from error
        raise


def _check_room(out: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    needed = 4 * len(KINDS) * sum(prod(shape) for shape in shapes.values())
    if (free := shutil.disk_usage(out).free) < needed:
        raise CheckpointError(
            f"writing {out} needs {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free "
            "there; free space, or choose another folder"
        )
