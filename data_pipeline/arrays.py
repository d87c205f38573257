"""NumPy's files of the shape and type that is expected; nothing is allocated for others."""

import lzma
import struct
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from untrusted.files import open_regular

# of zipfile: RuntimeError where a password is wanted
NPZ_FAULTS = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, NotImplementedError,
    struct.error, zlib.error, lzma.LZMAError,
)  # fmt: skip


def read_int64(file: IO[bytes], shape: Sequence[int]) -> NDArray[np.int64]:
    """Return the array of a .npy file. Raises ValueError for another shape or type, OSError."""
    reader = {(1, 0): np.lib.format.read_array_header_1_0}.get(np.lib.format.read_magic(file))
    if reader is None:
        raise ValueError("an unknown version of the .npy format")
    found, fortran_order, dtype = reader(file)
    if found != tuple(shape) or dtype != np.dtype(np.int64) or fortran_order:
        raise ValueError(f"an array {list(found)} of {dtype}, not {list(shape)} of int64")
    size = 8 * int(np.prod(shape))
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes, not {size}")
    return np.frombuffer(data, np.int64).reshape(found)


def read_labels(file: Path | IO[bytes], name: str, shape: Sequence[int]) -> NDArray[np.int64]:
    """Return the array `labels` of an .npz file. Raises DataError, naming `name`."""
    try:
        with _opened(file) as regular, zipfile.ZipFile(regular) as archive:
            labels = read_int64(archive.open("labels.npy"), shape)
    except NPZ_FAULTS as error:
        raise damaged(name, error) from error
    if labels.min(initial=0) < 0:
        raise damaged(name, "negative counts")
    return labels


def read_note(file: Path | IO[bytes], name: str, max_bytes: int) -> str:
    """Return the text `note` of an .npz file. Raises DataError, naming `name`."""
    try:
        with _opened(file) as regular, zipfile.ZipFile(regular) as archive:
            if archive.getinfo("note.npy").file_size > max_bytes:
                raise ValueError(f"a note of more than {max_bytes} bytes")
            with archive.open("note.npy") as content:
                note = np.lib.format.read_array(content, allow_pickle=False)
    except (*NPZ_FAULTS, MemoryError) as error:
        raise damaged(name, error) from error
    if note.shape != () or note.dtype.kind != "U":
        raise damaged(name, f"a note of {note.dtype} {list(note.shape)}")
    return str(note)


def _opened(file: Path | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    return open_regular(file) if isinstance(file, Path) else nullcontext(file)


def damaged(name: str, why: object) -> DataError:
    """The error of a unit's file."""
    return DataError(f"{name} is damaged ({why}); remove it and run the same command again.")
