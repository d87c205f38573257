"""Making a checkpoint that no training run saved: imported or averaged weights, at step 0."""

from math import prod
from pathlib import Path
from typing import Any

from checkpoints_tools import folder as folders
from checkpoints_tools.new_folder import new_folder
from checkpoints_tools.stored import KINDS
from checkpoints_tools.stored_writer import Reader, write_untrained_state
from untrusted.files import write_durably
from untrusted.secrets import redact_values

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
    num_bytes = 4 * len(KINDS) * sum(prod(shape) for shape in shapes.values())
    with new_folder(out, num_bytes) as content:
        temporary = folders.begin(content, 0)
        write_durably(temporary / "tokenizer.json", tokenizer)
        entries = write_untrained_state(temporary, shapes, read)
        folders.commit(content, 0, START | redact_values(state), entries)
    return folders.step_folder(out, 0)
