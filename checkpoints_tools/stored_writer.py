"""Writing a whole checkpoint's tensors a block of rows at a time, in one process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.pieces_file import (
    PlannedPiece,
    header_of,
    pieces_file,
    stored_tensors,
    write_pieces,
)
from checkpoints_tools.stored import KINDS, row_blocks
from checkpoints_tools.tensor_index import INDEX, index_text
from untrusted.files import write_durably

Blocks = Iterator[tuple[range, Tensor]]
Reader = Callable[[str], Blocks]


def write_untrained_state(
    step_dir: Path, shapes: dict[str, tuple[int, ...]], read: Reader
) -> dict[str, Any]:
    """Write float32 weights and moments that are zero; size and checksum of the large file.

    shapes: of every parameter by name; read: its rows in order, in blocks. Raises OSError, and
    CheckpointError when the blocks are not the whole tensor.
    """
    pieces = [
        PlannedPiece(f"{kind}.{name}", shape, torch.float32, tuple(0 for _ in shape), shape)
        for kind in KINDS
        for name, shape in shapes.items()
    ]

    def values() -> Iterator[Tensor]:
        for kind in KINDS:
            for name, shape in shapes.items():
                begin = 0
                for rows, block in read(name) if kind == "weight" else _zeros(shape):
                    if rows.start != begin or block.shape != (len(rows), *shape[1:]):
                        raise CheckpointError(f"{name}: rows {rows} came, not those from {begin}")
                    begin = rows.stop
                    yield block.to(torch.float32).contiguous()
                if begin != shape[0]:
                    raise CheckpointError(f"{name}: {begin} rows came, not {shape[0]}")

    file = pieces_file(0)
    entry = write_pieces(step_dir / file, header_of(pieces), values())
    write_durably(step_dir / INDEX, index_text(stored_tensors([(file, pieces)])).encode())
    return {file: entry}


def _zeros(shape: tuple[int, ...]) -> Blocks:
    row = torch.zeros((1, *shape[1:]))
    for rows in row_blocks(shape[0], row.nbytes):
        yield rows, torch.zeros((len(rows), *shape[1:]))
