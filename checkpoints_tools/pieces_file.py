"""Writing the file of one rank: safetensors, a tensor a piece, checksummed on the way.

Sizes are known beforehand, so the header comes first and the values follow in the order of the
pieces, from host memory or a block at a time.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import BLOCK, DIGEST
from checkpoints_tools.tensor_index import NAMES, Piece, StoredTensor, piece_name
from untrusted.files import create_file


@dataclass(frozen=True)
class PlannedPiece:
    """A box of a global tensor that one rank writes."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def pieces_file(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def header_of(pieces: Sequence[PlannedPiece]) -> bytes:
    """Return the beginning of a safetensors file whose values are those of `pieces`, in order.

    Wide dtypes come first, so that every tensor begins at a multiple of its item size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        begin, end = end, end + prod(piece.sizes) * piece.dtype.itemsize
        header[piece_name(piece.name, piece.offsets, piece.sizes)] = {
            "dtype": NAMES[piece.dtype],
            "shape": piece.sizes,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stored_tensors(files: Iterable[tuple[str, Sequence[PlannedPiece]]]) -> list[StoredTensor]:
    """Return the tensors that files with these pieces hold together, by name.

    Raises CheckpointError where two files have a tensor with other shapes or dtypes.
    """
    found: dict[str, StoredTensor] = {}
    pieces: dict[str, list[Piece]] = {}
    for file, planned in files:
        at = len(header_of(planned))
        for piece in planned:
            tensor = StoredTensor(piece.name, piece.shape, piece.dtype, ())
            if found.setdefault(piece.name, tensor) != tensor:
                raise CheckpointError(f"ranks disagree on {tensor} and {found[piece.name]}")
            place = Piece(piece.offsets, piece.sizes, file, at)
            pieces.setdefault(piece.name, []).append(place)
            at += prod(piece.sizes) * piece.dtype.itemsize
    return [replace(found[name], pieces=tuple(pieces[name])) for name in sorted(found)]


def write_pieces(path: Path, header: bytes, values: Iterable[Tensor]) -> dict[str, Any]:
    """Write a file that is on disk on return: the header, then contiguous host tensors.

    Returns its size and checksum, as a manifest lists them. Raises OSError.
    """
    digest = xxhash.xxh64()
    with create_file(path, buffering=0) as file:
        size = write_block(file, header, digest)
        for tensor in values:
            content = tensor.reshape(-1).view(torch.uint8).numpy().data
            for begin in range(0, len(content), BLOCK):
                size += write_block(file, content[begin : begin + BLOCK], digest)
        os.fsync(file.fileno())
    return {"bytes": size, DIGEST: digest.hexdigest()}


def write_block(file: Any, content: bytes | memoryview, digest: Any) -> int:
    """Write all of `content` to an unbuffered file and add it to the checksum; its size."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
    digest.update(content)
    return len(content)
