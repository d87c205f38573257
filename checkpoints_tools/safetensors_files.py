"""Safetensors files written and read a block of rows at a time.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes one after another. Sizes are known beforehand, so the header can be written first.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.stored import give_memory_back, read_into, row_blocks

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # as the library has it


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def header_bytes(self) -> int:
        """At most so many of the header speak of it."""
        return len(self.name) + 130 + 12 * len(self.shape)


# -- writing ---------------------------------------------------------------------------------------


def plan_files(tensors: Iterable[Planned], max_bytes: int) -> dict[str, list[Planned]]:
    """Files of at most `max_bytes` (or of one tensor), in order; one when all fit into it."""
    files: list[list[Planned]] = [[]]
    size = 128
    for tensor in tensors:
        needed = tensor.num_bytes + tensor.header_bytes
        if files[-1] and size + needed > max_bytes:
            files.append([])
            size = 128
        files[-1].append(tensor)
        size += needed
    if len(files) == 1:
        return {WHOLE: files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": part
        for number, part in enumerate(files, 1)
    }


def write_files(
    folder: Path, files: dict[str, list[Planned]], read: Callable[[Planned], Iterator[Tensor]]
) -> None:
    """Write planned files, and the index when there are several; all durable on return.

    read: the rows of a tensor in order, in blocks of its dtype. Raises OSError, or CheckpointError
    when the blocks are not the whole tensor.
    """
    for name, tensors in files.items():
        _write_file(folder / name, tensors, read)
    if list(files) != [WHOLE]:
        total = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
        weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
    path: Path, tensors: list[Planned], read: Callable[[Planned], Iterator[Tensor]]
) -> None:
    # wide types first: every tensor then begins at a multiple of its item size
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for block in read(tensor):
                if block.dtype != tensor.dtype or block.shape[1:] != tensor.shape[1:]:
                    raise CheckpointError(
                        f"{tensor.name}: a block {block.dtype} {tuple(block.shape)} of a tensor "
                        f"{tensor.dtype} {tensor.shape}"
                    )
                content = block.contiguous().reshape(-1).view(torch.uint8).numpy()
                written += file.write(content.data)
            if written != tensor.num_bytes:
                raise CheckpointError(
                    f"{tensor.name}: {written} bytes came, not {tensor.num_bytes}; nothing is kept"
                )
        file.flush()
        os.fsync(file.fileno())


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    file: Path
    at: int


class SafetensorsFolder:
    """The tensors of model.safetensors, or of the files that its index names, by name.

    Raises CheckpointError when a file is missing, damaged, or not what the index says; no tensor is
    read yet.
    """

    def __init__(self, folder: Path) -> None:
        give_memory_back()
        self.folder = folder
        self.tensors: dict[str, Planned] = {}
        self._places: dict[str, _Place] = {}
        try:
            weight_map = self._weight_map()
            for file in [WHOLE] if weight_map is None else sorted(set(weight_map.values())):
                self._read_header(folder / file, weight_map)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: the weights cannot be read ({error}); copy the folder again, whole"
            ) from error
        if weight_map is not None and (absent := sorted(weight_map.keys() - self.tensors.keys())):
            raise CheckpointError(
                f"{folder / INDEX} names {len(absent)} tensors that are not in their files "
                f"({', '.join(absent[:4])}); copy the folder again, whole"
            )

    def _weight_map(self) -> dict[str, str] | None:
        index = self.folder / INDEX
        if not index.exists():
            return None
        if (self.folder / WHOLE).exists():
            raise CheckpointError(f"{self.folder} has both {WHOLE} and {INDEX}; remove one")
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        for file in weight_map.values():
            if Path(file).name != file:
                raise CheckpointError(f"{index} names {file}, which is not a file beside it")
        return weight_map

    def _read_header(self, path: Path, weight_map: dict[str, str] | None) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, size):
                raise ValueError(f"{path.name} has no safetensors header")
            header = json.loads(file.read(length))
        end = 0
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{name} in {path.name} is {entry['dtype']}, not {', '.join(DTYPES)}"
                )
            tensor = Planned(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
            if name in self.tensors:
                raise ValueError(f"{name} is stored twice, the second time in {path.name}")
            if weight_map is not None and weight_map.get(name) != path.name:
                raise ValueError(f"{INDEX} does not place {name} in {path.name}")
            begin, stop = entry["data_offsets"]
            if begin != end or stop - begin != tensor.num_bytes:
                raise ValueError(f"the bytes of {name} in {path.name} are not those of its shape")
            end = stop
            self.tensors[name] = tensor
            self._places[name] = _Place(path, 8 + length + begin)
        if 8 + length + end != size:
            raise ValueError(
                f"{path.name} has {size} bytes, its header speaks of {8 + length + end}"
            )

    def blocks(self, name: str) -> Iterator[tuple[range, Tensor]]:
        """The rows of a tensor in order, in blocks of the dtype it is stored in."""
        tensor, place = self.tensors[name], self._places[name]
        row_bytes = prod(tensor.shape[1:]) * tensor.dtype.itemsize
        with place.file.open("rb") as file:
            file.seek(place.at)
            for rows in row_blocks(tensor.shape[0], row_bytes):
                block = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype)
                try:
                    read_into(file, block)
                except EOFError as error:
                    raise CheckpointError(
                        f"{place.file}: {name}: {error}; copy it again"
                    ) from error
                yield rows, block
