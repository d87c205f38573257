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
MAX_INDEX_BYTES = 1 << 32
MAX_COMPARED = 10_000_000  # pairs of pieces of one tensor; 1,024 ranks need some 100,000
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
        return {name: _tensor(name, entry, files) for name, entry in found["tensors"].items()}
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
    tensor = StoredTensor(name, shape, DTYPES[entry["dtype"]], tuple(pieces))
    check_cover(name, tensor.shape, tensor.pieces)
    return tensor


def check_cover(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> None:
    """Raise CheckpointError unless every element of the tensor is in exactly one piece."""
    volume = 0
    for piece in pieces:
        ends = [o + s for o, s in zip(piece.offsets, piece.sizes, strict=True)]
        inside = len(ends) == len(shape) and all(e <= n for e, n in zip(ends, shape, strict=True))
        if not inside or min((*piece.sizes, *piece.offsets), default=0) < 0:
            raise CheckpointError(f"{name} {shape} has a piece outside of it: {_box(piece)}")
        volume += prod(piece.sizes)
    if volume < prod(shape):
        raise CheckpointError(
            f"{name} {shape} has {prod(shape)} values, its pieces {volume}: a part is missing"
        )
    active: list[Piece] = []
    compared = 0
    for piece in sorted(pieces, key=lambda p: p.offsets):
        # sorted by the first dimension: only pieces that reach into this row can overlap
        active = [p for p in active if p.offsets[0] + p.sizes[0] > piece.offsets[0]]
        compared += len(active)
        if compared > MAX_COMPARED:
            raise CheckpointError(f"{name} {shape} has {len(pieces)} pieces, more than any run's")
        for other in active:
            if _overlap(other, piece):
                raise CheckpointError(f"{name}: {_box(other)} and {_box(piece)} overlap")
        active.append(piece)


def _overlap(a: Piece, b: Piece) -> bool:
    dims = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(max(oa, ob) < min(oa + sa, ob + sb) for oa, sa, ob, sb in dims)


def _box(piece: Piece) -> str:
    return f"{list(piece.sizes)} at {list(piece.offsets)}"
