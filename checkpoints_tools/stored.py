"""Reading the tensors of a sharded checkpoint a block of rows at a time, in one process.

DCP's own loading wants a whole tensor and reads whole items: of a checkpoint written by one rank
these are as large as the embedding. Here an item's header is read first, then only the bytes of the
rows that are asked for. Neither Megatron-core nor DeepSpeed is imported.
"""

import contextlib
import ctypes
import io
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from checkpoints_tools.errors import CheckpointError

BLOCK_BYTES = 8 << 20
M_MMAP_THRESHOLD = -3  # of malloc.h
METADATA = ".metadata"
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the bytes of a file that torch.save made of it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor: its pieces cover it exactly once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def row_bytes(self) -> int:
        """Of one index of the first dimension."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of all its values."""
        return prod(self.shape) * self.dtype.itemsize


def row_blocks(rows: int, row_bytes: int) -> Iterator[range]:
    """Consecutive ranges of rows of at most BLOCK_BYTES (or of one row) each."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, rows, step):
        yield range(first, min(first + step, rows))


def give_memory_back() -> None:
    """Have the C library return a block's memory when it is freed.

    glibc raises its limit for that as it goes, up to 32 MiB, and then finds no use for the holes
    that aligned blocks leave: reading 2 GB in blocks of 8 MB came to hold 1.7 GB.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


class StoredTensors:
    """The tensors that .metadata of a step folder describes, by name (`weight.model. ...`).

    Raises CheckpointError when .metadata cannot be read, or a tensor's pieces leave a gap or
    overlap; no tensor is read yet.
    """

    def __init__(self, step_dir: Path) -> None:
        give_memory_back()
        self.step_dir = step_dir
        self.tensors = _described(step_dir)
        self._places: dict[Piece, int | None] = {}

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights (or moments), by parameter name."""
        prefix = f"{kind}."
        return {
            name.removeprefix(prefix): tensor.shape
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def blocks(self, name: str) -> Iterator[tuple[range, Tensor]]:
        """The rows of a tensor in order, in blocks; raises CheckpointError."""
        tensor = self.tensors[name]
        for rows in row_blocks(tensor.shape[0], tensor.row_bytes):
            yield rows, self.rows(name, rows)

    def rows(self, name: str, rows: range) -> Tensor:
        """Rows [len(rows), ...] of a tensor. Raises CheckpointError when they cannot be read."""
        tensor = self.tensors[name]
        out = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype)
        for piece in tensor.pieces:
            begin = piece.offsets[0]
            first, end = max(rows.start, begin), min(rows.stop, begin + piece.sizes[0])
            if first >= end:
                continue
            part = self._read(tensor, piece, range(first - begin, end - begin))
            columns = zip(piece.offsets[1:], piece.sizes[1:], strict=True)
            box = (
                slice(first - rows.start, end - rows.start),
                *(slice(o, o + s) for o, s in columns),
            )
            out[box] = part
        return out

    def _read(self, tensor: StoredTensor, piece: Piece, rows: range) -> Tensor:
        try:
            place = self._place(tensor, piece) if piece.length > BLOCK_BYTES else None
            if place is None:
                found = self._whole(piece)[rows.start : rows.stop]
            else:
                found = self._slice(tensor, piece, place, rows)
        except Exception as error:  # damaged bytes make torch.load raise nearly anything
            raise CheckpointError(
                f"{self.step_dir / piece.file}: {tensor.name} cannot be read "
                f"({_first_line(error)}); `transxssm checkpoint verify --deep` tells which files "
                "are damaged"
            ) from error
        wanted = (len(rows), *piece.sizes[1:])
        if tuple(found.shape) != wanted or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"{self.step_dir / piece.file}: {tensor.name} is {found.dtype} "
                f"{tuple(found.shape)} there, {tensor.dtype} {wanted} in {METADATA}; use another "
                "checkpoint"
            )
        return found

    def _whole(self, piece: Piece) -> Tensor:
        with (self.step_dir / piece.file).open("rb") as file:
            file.seek(piece.at)
            content = io.BytesIO(file.read(piece.length))
        whole: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        return whole

    def _place(self, tensor: StoredTensor, piece: Piece) -> int | None:
        """Where in its file the values of a piece begin, in order; None when they have another."""
        if piece not in self._places:
            with (self.step_dir / piece.file).open("rb") as file, FakeTensorMode():
                view = cast(IO[bytes], _create_file_view(file, piece.at, piece.length))
                header = torch.load(view, weights_only=True)  # reads no values
            place = piece.at + header.untyped_storage()._checkpoint_offset
            place += header.storage_offset() * header.dtype.itemsize
            expected = (header.shape, header.dtype) == (piece.sizes, tensor.dtype)
            in_order = expected and header.is_contiguous()
            self._places[piece] = place if in_order else None
        return self._places[piece]

    def _slice(self, tensor: StoredTensor, piece: Piece, place: int, rows: range) -> Tensor:
        row_bytes = prod(piece.sizes[1:]) * tensor.dtype.itemsize
        found = torch.empty((len(rows), *piece.sizes[1:]), dtype=tensor.dtype)
        with (self.step_dir / piece.file).open("rb") as file:
            file.seek(place + rows.start * row_bytes)
            read_into(file, found)
        return found


def read_into(file: IO[bytes], tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes that follow. Raises EOFError."""
    content = tensor.view(-1).view(torch.uint8).numpy()
    if file.readinto(content.data) != content.size:  # type: ignore[attr-defined]
        raise EOFError("the file ends too early")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# -- what .metadata says ---------------------------------------------------------------------------


def _described(step_dir: Path) -> dict[str, StoredTensor]:
    try:
        metadata = FileSystemReader(step_dir).read_metadata()
        places = metadata.storage_data
        return {
            name: _stored(name, entry, places)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except CheckpointError as error:
        raise CheckpointError(f"{step_dir / METADATA}: {error}; use another checkpoint") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(
            f"{step_dir / METADATA} cannot be read ({type(error).__name__}: {_first_line(error)}); "
            "use another checkpoint"
        ) from error


def _stored(
    name: str, entry: TensorStorageMetadata, places: dict[MetadataIndex, object]
) -> StoredTensor:
    pieces = []
    for chunk in entry.chunks:
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise CheckpointError(f"no file holds {name} from {tuple(chunk.offsets)} on")
        file, at, length = (getattr(place, n) for n in ("relative_path", "offset", "length"))
        pieces.append(Piece(tuple(chunk.offsets), tuple(chunk.sizes), str(file), at, length))
    tensor = StoredTensor(name, tuple(entry.size), entry.properties.dtype, tuple(pieces))
    check_cover(name, tensor.shape, tensor.pieces)
    return tensor


def check_cover(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> None:
    """Raise CheckpointError unless every element of the tensor is in exactly one piece."""
    volume = 0
    active: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: p.offsets):
        ends = [o + s for o, s in zip(piece.offsets, piece.sizes, strict=True)]
        inside = len(ends) == len(shape) and all(e <= n for e, n in zip(ends, shape, strict=True))
        if not inside or min((*piece.sizes, *piece.offsets), default=0) < 0:
            raise CheckpointError(f"{name} {shape} has a piece outside of it: {_box(piece)}")
        volume += prod(piece.sizes)
        # sorted by the first dimension: only pieces that reach into this row can overlap
        active = [p for p in active if p.offsets[0] + p.sizes[0] > piece.offsets[0]]
        for other in active:
            if _overlap(other, piece):
                raise CheckpointError(f"{name}: {_box(other)} and {_box(piece)} overlap")
        active.append(piece)
    if volume != prod(shape):
        raise CheckpointError(
            f"{name} {shape} has {prod(shape)} values, its pieces {volume}: a part is missing"
        )


def _overlap(a: Piece, b: Piece) -> bool:
    dims = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(max(oa, ob) < min(oa + sa, ob + sb) for oa, sa, ob, sb in dims)


def _box(piece: Piece) -> str:
    return f"{list(piece.sizes)} at {list(piece.offsets)}"
