"""Checkpoints of format version 2: `.metadata`, a pickle, and `.distcp` files of archives.

torch.distributed.checkpoint wrote both, the archives with torch.save. Neither is unpickled by the
rules of pickle or torch: `.metadata` is read by an unpickler that knows the few classes in it as
inert records, and of an archive only the bytes of its one storage are read.
"""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.tensor_index import REMEDY, Piece, StoredTensor, check_cover
from untrusted.errors import UntrustedError
from untrusted.files import read_regular
from untrusted.names import check_file_name

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30
DCP = "torch.distributed.checkpoint"


class _Record:
    """Stands for an object of a pickle: what would be its state, and nothing that runs."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, field: str) -> Any:
        return self.state[field]


class _MetadataIndex(_Record):
    """A name and offsets: a key, so hashed before it has its state. There it is as itself."""


class _Tensor(_Record):
    """TensorStorageMetadata."""


def _size(dimensions: Any = ()) -> tuple[Any, ...]:
    return tuple(dimensions)


KNOWN: dict[tuple[str, str], Any] = {
    (f"{DCP}.metadata", "Metadata"): _Record,
    (f"{DCP}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{DCP}.metadata", "BytesStorageMetadata"): _Record,
    (f"{DCP}.metadata", "TensorProperties"): _Record,
    (f"{DCP}.metadata", "ChunkStorageMetadata"): _Record,
    (f"{DCP}.metadata", "MetadataIndex"): _MetadataIndex,
    (f"{DCP}.metadata", "StorageMeta"): _Record,
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"): _Record,
    (f"{DCP}.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    # of the folder that was written to; Python 3.13 renamed it
    ("pathlib", "PosixPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
    ("torch", "Size"): _size,
    ("torch", "float32"): torch.float32,
    ("torch", "uint8"): torch.uint8,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no checkpoint holds"
            ) from None

    def persistent_load(self, _: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside of itself")


def read_old_index(step_dir: Path) -> dict[str, StoredTensor]:
    """Return the tensors that `.metadata` describes, by name; no code in it runs.

    Raises CheckpointError when it is anything but a description of tensors, or a tensor's pieces
    leave a gap or overlap.
    """
    path = step_dir / METADATA
    try:
        metadata = _unpickled(read_regular(path, MAX_METADATA_BYTES))
        places = {
            (index["fqn"], tuple(index.state.get("offset") or ())): place
            for index, place in metadata["storage_data"].items()
        }
        entries = metadata["state_dict_metadata"].items()
        return {name: _tensor(name, entry, places, path) for name, entry in entries}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from error
    except UntrustedError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason}); {REMEDY}"
        ) from error


def _unpickled(content: bytes) -> _Record:
    for code, argument, _ in pickletools.genops(content):
        # the memo is a table: one huge index would take all memory
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > len(content):
            raise pickle.UnpicklingError(f"it has a memo of {argument} entries")
    metadata = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, _Record):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    return metadata


def _tensor(name: Any, entry: Any, places: dict[Any, _Record], path: Path) -> StoredTensor:
    if not isinstance(entry, _Tensor):
        raise CheckpointError(f"{name!r:.80} is no tensor")
    dtype = entry["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name!r:.80} is of no known dtype")
    pieces = []
    for chunk in entry["chunks"]:
        place = places.get((name, tuple(chunk["offsets"])))
        if place is None:
            raise CheckpointError(f"no file holds {name} from {tuple(chunk['offsets'])} on")
        file = check_file_name(place["relative_path"], str(path))
        offsets, sizes = _integers(chunk["offsets"]), _integers(chunk["sizes"])
        at, length = _integers((place["offset"], place["length"]))
        pieces.append(Piece(offsets, sizes, file, at, archive=length))
    tensor = StoredTensor(str(name), _integers(entry["size"]), dtype, tuple(pieces))
    if not tensor.shape:
        raise CheckpointError(f"{name} has no dimensions")
    check_cover(tensor.name, tensor.shape, tensor.pieces)
    return tensor


def _integers(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value < 2**53 for value in values):
        raise CheckpointError(f"{values!r:.80} are no sizes")
    return tuple(values)


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
