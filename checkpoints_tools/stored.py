"""Reading the tensors of a sharded checkpoint: boxes of them, or a block of rows at a time.

Only the bytes of the rows that are asked for are read, in blocks, so memory does not grow with the
pieces. Neither Megatron-core nor DeepSpeed is imported, and nothing is unpickled.
"""

import contextlib
import ctypes
from collections.abc import Container, Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from checkpoints_tools import old_format
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.safetensors_header import read_header
from checkpoints_tools.tensor_index import (
    INDEX,
    NAMES,
    REMEDY,
    Piece,
    StoredTensor,
    piece_name,
    read_index,
)
from untrusted.errors import UntrustedError
from untrusted.files import open_regular
from untrusted.text import printable

BLOCK_BYTES = 8 << 20
M_MMAP_THRESHOLD = -3  # of malloc.h
KINDS = ("weight", "exp_avg", "exp_avg_sq")


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


def index_name(step_dir: Path) -> str:
    """Return the name of the file that describes the tensors of a step folder."""
    is_old = not (step_dir / INDEX).exists() and (step_dir / old_format.METADATA).exists()
    return old_format.METADATA if is_old else INDEX


class StoredTensors:
    """The tensors of a step folder, by name (`weight.model. ...`).

    Raises CheckpointError when its index cannot be read, a tensor's pieces leave a gap or overlap,
    a file is shorter than its pieces, or is not among `listed`, the files that the manifest has
    checksums of; no tensor is read yet.
    """

    def __init__(self, step_dir: Path, listed: Container[str]) -> None:
        give_memory_back()
        self.step_dir = step_dir
        is_old = index_name(step_dir) == old_format.METADATA
        read = old_format.read_old_index if is_old else read_index
        if index_name(step_dir) not in listed:
            raise CheckpointError(_not_listed(step_dir, index_name(step_dir)))
        self.tensors = read(step_dir)
        self._places: dict[Piece, int] = {}
        self._headers_seen: set[str] = set()
        self._open: tuple[str, IO[bytes]] | None = None
        self.file_ends = self._file_ends()  # bytes that are used of each file
        self._check_sizes(listed)

    def _file_ends(self) -> dict[str, int]:
        ends: dict[str, int] = {}
        for tensor in self.tensors.values():
            for piece in tensor.pieces:
                length = prod(piece.sizes) * tensor.dtype.itemsize
                if piece.archive and length > piece.archive:
                    raise CheckpointError(f"{self.step_dir}: {tensor.name} exceeds its archive")
                end = piece.at + (piece.archive or length)
                ends[piece.file] = max(end, ends.get(piece.file, 0))
        return ends

    def _check_sizes(self, listed: Container[str]) -> None:
        """Raise CheckpointError where a file cannot hold its pieces: they are allocated later."""
        for name, end in self.file_ends.items():
            path = self.step_dir / name
            if name not in listed:
                raise CheckpointError(_not_listed(self.step_dir, name))
            try:
                size = path.lstat().st_size
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error.strerror}); {REMEDY}"
                ) from error
            if size < end:
                raise CheckpointError(
                    f"{path} has {size} bytes, {index_name(self.step_dir)} uses {end}; {REMEDY}"
                )

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
        self.fill(name, (rows.start, *(0 for _ in tensor.shape[1:])), out)
        return out

    def fill(self, name: str, offsets: tuple[int, ...], out: Tensor) -> None:
        """Fill `out`, on any device, with the box of a tensor that begins at `offsets`.

        Raises CheckpointError when a part of it cannot be read.
        """
        tensor = self.tensors[name]
        ends = [o + s for o, s in zip(offsets, out.shape, strict=True)]
        for piece in tensor.pieces:
            low = [max(a, b) for a, b in zip(offsets, piece.offsets, strict=True)]
            stops = (o + s for o, s in zip(piece.offsets, piece.sizes, strict=True))
            high = [min(a, b) for a, b in zip(ends, stops, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = _box(low, high, piece.offsets)
            target = out[_box(low, high, offsets)]
            row_bytes = prod(piece.sizes[1:]) * tensor.dtype.itemsize
            for rows in row_blocks(high[0] - low[0], row_bytes):
                begin = there[0].start
                part = self._read(tensor, piece, range(begin + rows.start, begin + rows.stop))
                target[rows.start : rows.stop].copy_(part[:, *there[1:]])

    def _read(self, tensor: StoredTensor, piece: Piece, rows: range) -> Tensor:
        """Whole rows of a piece."""
        found = torch.empty((len(rows), *piece.sizes[1:]), dtype=tensor.dtype)
        row_bytes = prod(piece.sizes[1:]) * tensor.dtype.itemsize
        try:
            file = self._opened(piece.file)
            file.seek(self._place(file, tensor, piece) + rows.start * row_bytes)
            read_into(file, found)
        except (OSError, EOFError, ValueError) as error:
            if not self.step_dir.exists():
                raise CheckpointError(
                    f"{self.step_dir} was removed while it was being read, as a run removes its "
                    "older checkpoints; name newer ones, or raise checkpoint.keep_last"
                ) from error
            raise CheckpointError(
                f"{self.step_dir / piece.file}: {tensor.name} cannot be read ({error}); "
                "`transxssm checkpoint verify --deep` tells which files are damaged"
            ) from error
        return found

    def _opened(self, name: str) -> IO[bytes]:
        """The file, kept open until another is read."""
        if self._open is None or self._open[0] != name:
            self.close()
            try:
                self._open = name, open_regular(self.step_dir / name)
                if name not in self._headers_seen:
                    self._check_header(name, self._open[1])
                    self._headers_seen.add(name)
            except UntrustedError as error:
                raise CheckpointError(str(error)) from error
        return self._open[1]

    def check_headers(self) -> dict[str, str]:
        """Return what is wrong with each file whose header has tensors elsewhere than the index."""
        found = {}
        for name in self.file_ends:
            try:
                self._opened(name)
            except (CheckpointError, OSError) as error:
                found[name] = str(error)
        self.close()
        return found

    def _check_header(self, name: str, file: IO[bytes]) -> None:
        """Raise CheckpointError unless a file has its pieces where the index says."""
        held = self._pieces_of[name]
        if any(piece.archive for _, piece in held):
            return  # no safetensors file
        path = self.step_dir / name
        header, begin = read_header(file, path, REMEDY)
        for tensor, piece in held:
            size = prod(piece.sizes) * tensor.dtype.itemsize
            at = piece.at - begin
            wanted = (NAMES[tensor.dtype], list(piece.sizes), [at, at + size])
            entry = header.get(title := piece_name(tensor.name, piece.offsets, piece.sizes))
            if entry is None or (entry["dtype"], entry["shape"], entry["data_offsets"]) != wanted:
                raise CheckpointError(
                    f"{path} does not have {printable(title)} where {INDEX} says ({wanted[0]}, "
                    f"bytes {at} to {at + size} behind its header); {REMEDY}"
                )

    @cached_property
    def _pieces_of(self) -> dict[str, list[tuple[StoredTensor, Piece]]]:
        """The pieces of each file."""
        found: dict[str, list[tuple[StoredTensor, Piece]]] = {}
        for tensor in self.tensors.values():
            for piece in tensor.pieces:
                found.setdefault(piece.file, []).append((tensor, piece))
        return found

    def close(self) -> None:
        """Close the file that was read last; reading opens it again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _place(self, file: IO[bytes], tensor: StoredTensor, piece: Piece) -> int:
        """Where in its file the values of a piece begin."""
        if not piece.archive:
            return piece.at
        if piece not in self._places:
            num_bytes = prod(piece.sizes) * tensor.dtype.itemsize
            self._places[piece] = old_format.values_in_archive(file, piece, num_bytes)
        return self._places[piece]


def _not_listed(step_dir: Path, name: str) -> str:
    return (
        f"{step_dir / name} is not listed in its manifest, so nothing says what it holds; {REMEDY}"
    )


def _box(low: list[int], high: list[int], origin: tuple[int, ...]) -> tuple[slice, ...]:
    """The box [low, high) as indices into a tensor that begins at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def read_into(file: IO[bytes], tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes that follow. Raises EOFError."""
    content = tensor.view(-1).view(torch.uint8).numpy()
    if file.readinto(content.data) != content.size:  # type: ignore[attr-defined]
        raise EOFError("the file ends too early")
