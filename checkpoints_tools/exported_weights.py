"""Weights of an exported single-GPU model, read into the shards of a training layout."""

from pathlib import Path

import torch.distributed as dist

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.global_tensors import GlobalTensor
from checkpoints_tools.safetensors_files import SafetensorsFolder
from checkpoints_tools.sharded import Weights, check_names, weights_to_load
from parallel.groups import from_rank_0


def load_exported_weights(folder: Path, weights: Weights) -> None:
    """Fill the weights of every rank, each reading its own parts alone. Collective.

    Raises CheckpointError naming tensors that are missing, unknown or of another shape.
    """
    wanted = weights_to_load(weights)
    stored = from_rank_0(lambda: SafetensorsFolder(folder))
    check_names(folder, set(wanted), set(stored.tensors))
    causes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(causes, _fill(stored, wanted))
    for rank, cause in enumerate(causes):
        if cause is not None:
            raise CheckpointError(f"rank {rank}: {cause}")
    weights.refresh_parameters()


def _fill(stored: SafetensorsFolder, wanted: dict[str, GlobalTensor]) -> str | None:
    """Read this rank's parts; return what hinders it."""
    for name, target in wanted.items():
        if (shape := stored.tensors[name].shape) != tuple(target.shape):
            return (
                f"{stored.folder}: {name} has shape {list(shape)}, but the [model] section gives "
                f"it {list(target.shape)}; use the section it was trained with"
            )
        for part in target.parts:
            first, *others = (
                range(begin, begin + size)
                for begin, size in zip(part.offsets, part.data.shape, strict=True)
            )
            columns = [slice(r.start, r.stop) for r in others]
            try:
                for rows, block in stored.blocks(name, first):
                    target_rows = slice(rows.start - first.start, rows.stop - first.start)
                    part.data[target_rows].copy_(block[:, *columns])
            except CheckpointError as error:
                return str(error)
    return None
