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
from typing import IO, Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.safetensors_header import Entry, read_header
from checkpoints_tools.stored import give_memory_back, read_into, row_blocks
from untrusted.errors import UntrustedError
from untrusted.files import create_file, open_regular, read_regular
from untrusted.names import check_file_name
from untrusted.records import parse_json
from untrusted.text import printable

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_INDEX = 1 << 26
MAX_NAME = 256  # of a tensor
REMEDY = "copy the folder again, whole"


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
    with create_file(path) as file:
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


class _Index(TypedDict):
    weight_map: dict[str, str]


_INDEX = TypeAdapter(_Index)


@dataclass(frozen=True)
class _Place:
    file: Path
    at: int


def is_exported(folder: Path) -> bool:
    """Return whether the folder has the names of an exported model's weights, whatever is there."""
    return any(os.path.lexists(folder / name) for name in (WHOLE, INDEX))


class SafetensorsFolder:
    """The tensors of model.safetensors, or of the files that its index names, by name.

    Everything that reads an exported model's weights reads them here: files are regular ones that
    lie in the folder itself, and every tensor is known with its place before a value is read.
    Raises CheckpointError when a file is missing, damaged, or not what the index says.
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
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise CheckpointError(f"{folder} lacks {missing}; {REMEDY}") from error
        except OSError as error:
            raise CheckpointError(
                f"{folder}: the weights cannot be read ({error}); {REMEDY}"
            ) from error
        except UntrustedError as error:
            raise CheckpointError(str(error)) from error
        if weight_map is not None and (absent := sorted(weight_map.keys() - self.tensors.keys())):
            named = printable(", ".join(name[:MAX_NAME] for name in absent[:4]))
            raise CheckpointError(
                f"{folder / INDEX} names {len(absent)} tensors that are not in their files "
                f"({named}); {REMEDY}"
            )

    def _weight_map(self) -> dict[str, str] | None:
        index = self.folder / INDEX
        if not os.path.lexists(index):
            return None
        if os.path.lexists(self.folder / WHOLE):
            raise CheckpointError(f"{self.folder} has both {WHOLE} and {INDEX}; remove one")
        content = read_regular(index, MAX_INDEX)
        weight_map = parse_json(content, _INDEX, str(index), REMEDY)["weight_map"]
        for file in set(weight_map.values()):
            check_file_name(file, str(index))
        return weight_map

    def _read_header(self, path: Path, weight_map: dict[str, str] | None) -> None:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header, at = read_header(file, path, REMEDY)
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if fault := self._add(name, entry, path, at, end, weight_map):
                shown = printable(name)[:MAX_NAME]
                raise CheckpointError(f"{path}: the tensor {shown} {fault}; {REMEDY}")
            end = entry["data_offsets"][1]
        if at + end != size:
            raise CheckpointError(
                f"{path} has {size} bytes, its header speaks of {at + end}; {REMEDY}"
            )

    def _add(
        self,
        name: str,
        entry: Entry,
        path: Path,
        at: int,
        end: int,
        weight_map: dict[str, str] | None,
    ) -> str | None:
        """Note a tensor whose values must begin `end` bytes after `at`; return what is wrong."""
        if len(name) > MAX_NAME or name != printable(name):
            return "has a name that no parameter has"
        if entry["dtype"] not in DTYPES:
            return f"is {printable(entry['dtype'])[:20]}, not {', '.join(DTYPES)}"
        if name in self.tensors:
            return "is stored twice"
        if weight_map is not None and weight_map.get(name) != path.name:
            return f"is not where {INDEX} places it"
        tensor = Planned(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
        begin, stop = entry["data_offsets"]
        if begin != end or stop - begin != tensor.num_bytes:
            return "has other bytes than those of its shape"
        self.tensors[name] = tensor
        self._places[name] = _Place(path, at + begin)
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def blocks(self, name: str, rows: range | None = None) -> Iterator[tuple[range, Tensor]]:
        """Yield rows [all] of a tensor in order, in blocks of the dtype it is stored in.

        Raises CheckpointError when they cannot be read.
        """
        tensor = self.tensors[name]
        row_bytes = prod(tensor.shape[1:]) * tensor.dtype.itemsize
        wanted = range(tensor.shape[0]) if rows is None else rows
        first = wanted.start
        with self._opened(name, first * row_bytes) as file:
            for part in row_blocks(len(wanted), row_bytes):
                block = torch.empty((len(part), *tensor.shape[1:]), dtype=tensor.dtype)
                self._fill(file, name, block)
                yield range(first + part.start, first + part.stop), block

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor. Raises CheckpointError when it cannot be read."""
        whole = torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        with self._opened(name, 0) as file:
            self._fill(file, name, whole)
        return whole

    def _opened(self, name: str, skipped: int) -> IO[bytes]:
        place = self._places[name]
        try:
            file = open_regular(place.file)
        except (OSError, UntrustedError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read ({error})") from error
        file.seek(place.at + skipped)
        return file

    def _fill(self, file: IO[bytes], name: str, block: Tensor) -> None:
        try:
            read_into(file, block)
        except (EOFError, OSError) as error:
            path = self._places[name].file
            raise CheckpointError(f"{path}: {name}: {error}; copy it again") from error
