"""Checkpoints of format version 2: `.metadata`, a pickle, and `.distcp` files of archives.

torch.distributed.checkpoint wrote both, the archives with torch.save. Neither is unpickled by the
rules of pickle or torch: of `.metadata` the few classes that it names become inert records, and of
an archive only the bytes of its one storage are read.
"""

import io
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.inert_pickle import Record, load
from checkpoints_tools.tensor_index import REMEDY, Piece, StoredTensor, check_covers
from untrusted.errors import UntrustedError
from untrusted.files import read_regular
from untrusted.names import check_file_name

METADATA = ".metadata"
# torch writes 145 bytes a piece, so these are 230,000: the 291 weights of a 7B model and their
# moments, all split over 256 ranks (ZeRO 3). Reading so many takes 20 s and 0.4 GiB
MAX_METADATA_BYTES = 1 << 25
MAX_DIMENSIONS = 8
DCP = "torch.distributed.checkpoint"


class _Tensor(Record):
    """TensorStorageMetadata."""


def _size(dimensions: Any = ()) -> tuple[int, ...]:
    return _integers(dimensions)


KNOWN: dict[tuple[str, str], Any] = {
    (f"{DCP}.metadata", "Metadata"): Record,
    (f"{DCP}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{DCP}.metadata", "BytesStorageMetadata"): Record,
    (f"{DCP}.metadata", "TensorProperties"): Record,
    (f"{DCP}.metadata", "ChunkStorageMetadata"): Record,
    (f"{DCP}.metadata", "MetadataIndex"): Record,
    (f"{DCP}.metadata", "StorageMeta"): Record,
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"): Record,
    (f"{DCP}.filesystem", "_StorageInfo"): Record,
    ("torch.serialization", "_get_layout"): Record,
    # of the folder that was written to; Python 3.13 renamed it
    ("pathlib", "PosixPath"): Record,
    ("pathlib._local", "PosixPath"): Record,
    ("torch", "Size"): _size,
    ("torch", "float32"): torch.float32,
    ("torch", "uint8"): torch.uint8,
}


def read_old_index(step_dir: Path) -> dict[str, StoredTensor]:
    """Return the tensors that `.metadata` describes, by name; no code in it runs.

    Raises CheckpointError when it is anything but a description of tensors, or a tensor's pieces
    leave a gap or overlap.
    """
    path = step_dir / METADATA
    try:
        metadata = load(read_regular(path, MAX_METADATA_BYTES), KNOWN)
        if not isinstance(metadata, Record):
            raise CheckpointError(f"it holds a {type(metadata).__name__}")
        places = _places(metadata)
        entries = metadata["state_dict_metadata"].items()
        tensors = {name: _tensor(name, entry, places, path) for name, entry in entries}
        check_covers(tensors.values())
        return tensors
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from error
    except UntrustedError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason}); {REMEDY}"
        ) from error


def _places(metadata: Record) -> dict[tuple[str, tuple[int, ...]], Record]:
    """Where the pieces lie, by the name of the tensor and the piece's offsets."""
    return {
        (_string(index["fqn"]), _integers(index.state.get("offset") or ())): place
        for index, place in metadata["storage_data"].items()
    }


def _tensor(name: Any, entry: Any, places: dict[Any, Record], path: Path) -> StoredTensor:
    if not isinstance(entry, _Tensor):
        raise CheckpointError(f"{_string(name)!r:.80} is no tensor")
    name = _string(name)
    dtype = entry["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name!r:.80} is of no known dtype")
    pieces = []
    for chunk in entry["chunks"]:
        offsets, sizes = _integers(chunk["offsets"]), _integers(chunk["sizes"])
        place = places.get((name, offsets))
        if place is None:
            raise CheckpointError(f"no file holds {name} from {offsets} on")
        file = check_file_name(place["relative_path"], str(path))
        at, length = _integers((place["offset"], place["length"]))
        pieces.append(Piece(offsets, sizes, file, at, archive=length))
    tensor = StoredTensor(name, _integers(entry["size"]), dtype, tuple(pieces))
    if not tensor.shape:
        raise CheckpointError(f"{name} has no dimensions")
    return tensor


# Their messages do not show what they refuse: it may be nested without end.


def _string(value: Any) -> str:
    if type(value) is not str:
        raise CheckpointError(f"a {type(value).__name__} is in place of a name")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > MAX_DIMENSIONS:
        raise CheckpointError(f"a {type(values).__name__} is in place of sizes")
    if not all(type(value) is int and 0 <= value < 2**53 for value in values):
        raise CheckpointError("it has sizes that are no numbers, or too large")
    return values


# -- archives --------------------------------------------------------------------------------------


def values_in_archive(file: IO[bytes], piece: Piece, num_bytes: int) -> int:
    """Return where in an open file the values of a piece begin.

    Raises ValueError where its archive does not hold one uncompressed storage of `num_bytes`.
    """
    try:
        with zipfile.ZipFile(_View(file, piece.at, piece.archive)) as archive:
            names = [n for n in archive.namelist() if n.rsplit("/", 2)[-2:-1] == ["data"]]
            (storage,) = (archive.getinfo(name) for name in names)
            plain = storage.compress_type == zipfile.ZIP_STORED
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise ValueError(f"it is no archive of one tensor ({error})") from error
    if not plain or storage.file_size != num_bytes:
        raise ValueError(f"its storage has {storage.file_size} bytes, not {num_bytes}")
    file.seek(piece.at + storage.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ValueError("its storage has no header")
    skipped = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if storage.header_offset + skipped + num_bytes > piece.archive:
        raise ValueError("its storage ends after it")
    return piece.at + storage.header_offset + skipped


class _View(io.RawIOBase):
    """Bytes [at, at + length) of an open file, as a file."""

    def __init__(self, file: IO[bytes], at: int, length: int) -> None:
        self._file, self._at, self._length, self._place = file, at, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if begin + offset < 0:
            raise ValueError("before the beginning")
        self._place = begin + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._place)
        self._file.seek(self._at + self._place)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._place += len(content)
        return content
