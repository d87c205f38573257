"""tensors.json: where the values of every tensor of a sharded checkpoint lie, as JSON.

    {"files": ["rank-00000.safetensors", ...],
     "tensors": {"weight.model.word_embed.weight":
        {"dtype": "F32", "shape": [V, H], "pieces": [[file, at, offsets..., sizes...], ...]}, ...}}

A piece is a box of the tensor whose values lie in order in files[file], from byte `at` on. The same
files can be read without this one: each is a safetensors file with a tensor a piece, named
"weight.model.word_embed.weight[0:512,0:256]".
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from checkpoints_tools.errors import CheckpointError
from untrusted.errors import UntrustedError
from untrusted.names import check_file_name
from untrusted.records import Count, read_json

INDEX = "tensors.json"
DTYPES = {"F32": torch.float32, "U8": torch.uint8}  # as safetensors names them
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A piece takes some 39 bytes: 82 MiB for the 2.2 million pieces of a 7B model's 873 weights and
# moments that ZeRO 3 splits over 1,000 ranks
MAX_INDEX_BYTES = 1 << 28
# See check_cover. A matrix that ZeRO 3 splits over 1,000 ranks is cut at 2,000 rows and 1,000
# columns, where a rank begins within a row; a 7B model has 873 weights and moments
MAX_CELLS_OF_A_TENSOR = 1 << 28
MAX_CELLS = 1 << 33
REMEDY = "use another checkpoint"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor; its values lie in order in a file, from byte `at` on.

    archive: bytes of the torch.save archive that `at` is the begin of instead (checkpoints of
    format version 2); 0 otherwise.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    archive: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor: its pieces cover it exactly once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return prod(self.shape) * self.dtype.itemsize


def piece_name(name: str, offsets: Iterable[int], sizes: Iterable[int]) -> str:
    """Return the name of a piece within its safetensors file."""
    ranges = (f"{o}:{o + s}" for o, s in zip(offsets, sizes, strict=True))
    return f"{name}[{','.join(ranges)}]"


def index_text(tensors: Iterable[StoredTensor]) -> str:
    """Return the content of tensors.json, a line a tensor."""
    lines = []
    numbers: dict[str, int] = {}
    for tensor in tensors:
        pieces = [
            [numbers.setdefault(p.file, len(numbers)), p.at, *p.offsets, *p.sizes]
            for p in tensor.pieces
        ]
        entry = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "pieces": pieces}
        lines.append(f"{json.dumps(tensor.name)}: {json.dumps(entry, separators=(',', ':'))}")
    described = ",\n".join(lines)
    return f'{{"files": {json.dumps(list(numbers))},\n"tensors": {{\n{described}\n}}}}\n'


class _Entry(TypedDict):
    dtype: Literal["F32", "U8"]
    shape: Annotated[list[Count], Field(min_length=1, max_length=8)]
    pieces: list[list[Count]]


class _Index(TypedDict):
    files: list[str]
    tensors: dict[str, _Entry]


_INDEX = TypeAdapter(_Index)


def read_index(step_dir: Path) -> dict[str, StoredTensor]:
    """Return the tensors that tensors.json describes, by name.

    Raises CheckpointError when it cannot be read, names a file outside of the folder, or a tensor's
    pieces leave a gap or overlap.
    """
    path = step_dir / INDEX
    try:
        found = read_json(path, _INDEX, REMEDY, max_bytes=MAX_INDEX_BYTES)
        files = [check_file_name(file, str(path)) for file in found["files"]]
        tensors = {name: _tensor(name, entry, files) for name, entry in found["tensors"].items()}
        check_covers(tensors.values())
        return tensors
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    except UntrustedError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from error


def _tensor(name: str, entry: _Entry, files: list[str]) -> StoredTensor:
    shape = tuple(entry["shape"])
    pieces = []
    for numbers in entry["pieces"]:
        if len(numbers) != 2 + 2 * len(shape) or numbers[0] >= len(files):
            raise CheckpointError(f"{name} {shape} has a piece that is none: {numbers}")
        file, at, *box = numbers
        offsets, sizes = tuple(box[: len(shape)]), tuple(box[len(shape) :])
        pieces.append(Piece(offsets, sizes, files[file], at))
    return StoredTensor(name, shape, DTYPES[entry["dtype"]], tuple(pieces))


def check_covers(tensors: Iterable[StoredTensor]) -> None:
    """Raise CheckpointError unless every element of every tensor is in exactly one piece."""
    left = MAX_CELLS
    for tensor in tensors:
        left -= check_cover(tensor.name, tensor.shape, tensor.pieces, left)


def check_cover(
    name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], most: int = MAX_CELLS
) -> int:
    """Raise CheckpointError unless every element of the tensor is in exactly one piece.

    The pieces' bounds cut every dimension, so the tensor into cells: each must be in one piece.
    Returns the number of cells, of which there may be `most`.
    """
    volume = 0
    for piece in pieces:
        ends = [o + s for o, s in zip(piece.offsets, piece.sizes, strict=True)]
        inside = len(ends) == len(shape) and all(e <= n for e, n in zip(ends, shape, strict=True))
        if not inside or min((*piece.sizes, *piece.offsets), default=0) < 0:
            raise CheckpointError(f"{name} {shape} has a piece outside of it: {_box(piece)}")
        if 0 in piece.sizes and 0 not in shape:
            raise CheckpointError(f"{name} {shape} has a piece without values: {_box(piece)}")
        volume += prod(piece.sizes)
    if volume < prod(shape):
        raise CheckpointError(
            f"{name} {shape} has {prod(shape)} values, its pieces {volume}: a part is missing"
        )
    if 0 in shape:
        return 0
    places = [_places(pieces, dim) for dim in range(len(shape))]
    num_cells = prod(len(place) - 1 for place in places)
    if num_cells > min(most, MAX_CELLS_OF_A_TENSOR):
        raise CheckpointError(f"{name} {shape} has {len(pieces)} pieces, cut as no run cuts them")
    covered = np.zeros([len(place) - 1 for place in places], bool)
    for piece in pieces:
        box = covered[
            tuple(
                slice(place[o], place[o + s])
                for place, o, s in zip(places, piece.offsets, piece.sizes, strict=True)
            )
        ]
        if box.any():
            raise CheckpointError(f"{name}: {_box(piece)} and another piece overlap")
        box[...] = True
    return num_cells


def _places(pieces: tuple[Piece, ...], dim: int) -> dict[int, int]:
    """The bounds of pieces in a dimension, each with its number in rising order."""
    bounds = {piece.offsets[dim] for piece in pieces}
    bounds |= {piece.offsets[dim] + piece.sizes[dim] for piece in pieces}
    return {bound: number for number, bound in enumerate(sorted(bounds))}


def _box(piece: Piece) -> str:
    return f"{list(piece.sizes)} at {list(piece.offsets)}"
