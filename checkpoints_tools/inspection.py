"""What checkpoints hold, from their manifests and metadata alone: no tensor is read."""

from math import prod
from pathlib import Path
from typing import Any

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import MANIFEST, read_manifest
from checkpoints_tools.source import parameter_shapes, single_gpu_config
from checkpoints_tools.stored import StoredTensors

SAID = (
    "step", "tokens", "samples", "adam_step", "world_size", "saved_at", "data_fingerprint",
    "tokenizer_hash", "eod_id", "pad_id", "git_revision", "skipped_shards", "versions", "layout",
    "imported", "averaged",
)  # fmt: skip
LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "context", "zero_stage", "offload")


def list_checkpoints(path: Path) -> list[dict[str, Any]]:
    """One entry a committed step, ascending: step, folder, and what its manifest says, or the
    `problem` that it has.

    path: a run, a checkpoints folder, or a step folder in one. Raises CheckpointError when there
    are none.
    """
    steps_folder = path if folders.committed_steps(path) else folders.resolve(path).parent
    return [
        {"step": step, "folder": str(folders.step_folder(steps_folder, step))}
        | _summary(folders.step_folder(steps_folder, step))
        for step in folders.committed_steps(steps_folder)
    ]


def _summary(step_dir: Path) -> dict[str, Any]:
    try:
        state = read_manifest(step_dir)
        return {
            "problem": None,
            "tokens": state["tokens"],
            "world_size": state["world_size"],
            "bytes": sum(entry["bytes"] for entry in state["files"].values()),
            "saved_at": state.get("saved_at"),
        }
    except CheckpointError as error:
        problem = str(error)
    except (OSError, LookupError, TypeError, AttributeError) as error:
        problem = f"{MANIFEST} cannot be used ({error!r})"
    return {"problem": problem} | dict.fromkeys(("tokens", "world_size", "bytes", "saved_at"))


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Fields of the manifest, sizes, and `tensors` {name: {shape, dtype, bytes, pieces, files}}.

    Raises CheckpointError.
    """
    step_dir = folders.resolve(path)
    state = read_manifest(step_dir)
    stored = StoredTensors(step_dir, state["files"])
    fields: dict[str, Any] = {"folder": str(step_dir)}
    fields |= {name: state[name] for name in SAID if state.get(name) not in (None, "", [])}
    if "layout" not in fields:
        parallel = state["config"].get("parallel", {})
        fields["layout"] = {name: parallel[name] for name in LAYOUT if name in parallel}
    shapes = parameter_shapes(single_gpu_config(state, "fp32"))
    sizes = {name: entry["bytes"] for name, entry in state["files"].items()}
    kinds: dict[str, int] = {}
    for name, tensor in stored.tensors.items():
        kind = name.partition(".")[0]
        kinds[kind] = kinds.get(kind, 0) + tensor.num_bytes
    fields |= {
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "bytes": sum(sizes.values()),
        "bytes_by_kind": kinds,
        "files": sizes,
        "model": state["config"]["model"],
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "bytes": tensor.num_bytes,
                "pieces": len(tensor.pieces),
                "files": sorted({piece.file for piece in tensor.pieces}),
            }
            for name, tensor in stored.tensors.items()
        },
    }
    return fields
