"""Writing a sharded checkpoint a block of rows at a time, in one process.

DCP's own writer keeps the tensors of a file until it closes it. What is written here is what it
would write: torch.save of every block one after another, and .metadata.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoints_tools.stored import KINDS, METADATA, row_blocks

FILE = "__0_0.distcp"
Blocks = Iterator[tuple[range, Tensor]]
Reader = Callable[[str], Blocks]


def write_untrained_state(step_dir: Path, shapes: dict[str, tuple[int, ...]], read: Reader) -> None:
    """Write float32 weights and moments that are zero.

    shapes: of every parameter by name; read: its rows in order, in blocks. Raises OSError.
    """
    entries: dict[str, STORAGE_TYPES] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with (step_dir / FILE).open("wb") as file:
        for kind in KINDS:
            for parameter, shape in shapes.items():
                name, chunks = f"{kind}.{parameter}", []
                blocks = read(parameter) if kind == "weight" else _zeros(shape)
                for rows, block in blocks:
                    offsets = torch.Size((rows.start, *(0 for _ in shape[1:])))
                    at = file.tell()
                    torch.save(block.contiguous(), file)
                    chunks.append(ChunkStorageMetadata(offsets, torch.Size(block.shape)))
                    index = MetadataIndex(name, offsets, len(chunks) - 1)
                    places[index] = _StorageInfo(FILE, at, file.tell() - at)
                properties = TensorProperties(dtype=torch.float32)
                entries[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        file.flush()
        os.fsync(file.fileno())
    metadata = Metadata(
        state_dict_metadata=entries,
        storage_data=places,
        storage_meta=StorageMeta(checkpoint_id=str(step_dir)),
        version=CURRENT_DCP_VERSION,
    )
    with (step_dir / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


def _zeros(shape: tuple[int, ...]) -> Blocks:
    row = torch.zeros((1, *shape[1:]))
    for rows in row_blocks(shape[0], row.nbytes):
        yield rows, torch.zeros((len(rows), *shape[1:]))
