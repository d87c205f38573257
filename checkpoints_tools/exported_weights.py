"""Weights of an exported single-GPU model, read into the shards of a training layout."""

import json
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.global_tensors import GlobalTensor
from checkpoints_tools.sharded import Weights, check_names, weights_to_load
from parallel.groups import from_rank_0

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_exported(folder: Path) -> bool:
    """Whether `folder` looks like what `transxssm checkpoint export` writes."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def load_exported_weights(folder: Path, weights: Weights) -> None:
    """Fill the weights of every rank, each reading its own parts alone. A collective.

    Raises CheckpointError naming tensors that are missing, unknown or of another shape.
    """
    wanted = weights_to_load(weights)
    places = from_rank_0(lambda: _places(folder))
    check_names(folder, set(wanted), set(places))
    causes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(causes, _fill(folder, places, wanted))
    for rank, cause in enumerate(causes):
        if cause is not None:
            raise CheckpointError(f"rank {rank}: {cause}")
    weights.refresh_parameters()


def _fill(folder: Path, places: dict[str, str], wanted: dict[str, GlobalTensor]) -> str | None:
    """Read this rank's parts; what hinders it."""
    try:
        for file in sorted(set(places.values())):
            with safe_open(folder / file, framework="pt") as tensors:
                for name in (name for name, place in places.items() if place == file):
                    if name not in wanted:  # of another pipeline stage
                        continue
                    stored, target = tensors.get_slice(name), wanted[name]
                    if (shape := stored.get_shape()) != list(target.shape):
                        return (
                            f"{folder / file}: {name} has shape {shape}, but the [model] section "
                            f"gives it {list(target.shape)}; use the section it was trained with"
                        )
                    for part in target.parts:
                        ends = zip(part.offsets, part.data.shape, strict=True)
                        box = tuple(slice(begin, begin + size) for begin, size in ends)
                        part.data.copy_(stored[box])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"{folder}: its weights cannot be read: {error}"
    return None


def _places(folder: Path) -> dict[str, str]:
    """The file of every tensor. Raises CheckpointError."""
    try:
        if (folder / INDEX).exists():
            found = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in found.items()}
        with safe_open(folder / SINGLE, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read: {error}") from error
