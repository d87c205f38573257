"""mosaicml-streaming's shard format, without importing the rest of the library.

`import streaming` takes seconds: its package file loads transformers and torchvision for datasets
not used here. The format's own modules need neither, so they are imported below bare stand-ins
for the two parent packages, which are taken away again: a later `import streaming` gets the real
one. This is the only file that knows.
"""

import importlib
import importlib.util
import os
import struct
import sys
from array import array
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.packing import Sample

INDEX = "index.json"
HASH = "xxh64"
NUM_PAD = struct.Struct("<q")
LENS_BYTES = 4 + 1 + 8 + 8  # of a sample, besides tokens and lengths of documents, at most


def without_packages(module: str) -> Any:
    """A module of streaming, imported without its packages' own files."""
    if "streaming" in sys.modules:
        return importlib.import_module(module)
    spec = importlib.util.find_spec("streaming")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("mosaicml-streaming is not installed; run `make setup`")
    (root,) = spec.submodule_search_locations
    packages = ("streaming", "streaming.base", "streaming.base.storage")
    for name in packages:
        parent = ModuleType(name)
        parent.__path__ = [f"{root}{name.removeprefix('streaming').replace('.', '/')}"]
        sys.modules[name] = parent
    try:
        return importlib.import_module(module)
    finally:
        # What was imported stays, since the library looks itself up in sys.modules.
        for name in packages:
            del sys.modules[name]


# the format first: the library's modules import each other in a circle
MDSWriter = without_packages("streaming.base.format.mds").MDSWriter


def columns(token_dtype: str, seq_len: int) -> dict[str, str]:
    """What a sample's fields are stored as."""
    return {
        "doc_lens": "ndarray:int32",
        "num_pad": "int",
        "tokens": f"ndarray:{token_dtype}:{seq_len + 1}",
    }


def open_writer(folder: str, token_dtype: str, seq_len: int, shard_bytes: int) -> Any:
    """A writer of uncompressed shards; `tokens` [seq_len + 1] are checked on every write."""
    fields = columns(token_dtype, seq_len)
    return MDSWriter(columns=fields, out=folder, hashes=[HASH], size_limit=shard_bytes)


def described(path: Path) -> dict[str, Any]:
    """A file as index.json lists it."""
    content = path.read_bytes()
    digest = xxhash.xxh64_hexdigest(content)
    return {"basename": path.name, "bytes": len(content), "hashes": {HASH: digest}}


class MdsShard:
    """One shard's samples by number; safe to use from several threads.

    A shard is the number of samples, the uint32 offsets of their begins and of their end, a
    description, and the samples; a sample is the size of its doc_lens (uint32) and its fields in
    alphabetical order: doc_lens with a byte for its rank and its length in front, num_pad (int64),
    tokens. Decoding it here takes a tenth of the library's time (tests compare the two).
    """

    def __init__(
        self, file: IO[bytes], samples: int, token_dtype: np.dtype[Any], length: int
    ) -> None:
        """length: tokens of a sample. Raises OSError, or ValueError for a file that is cut off."""
        self._file, self._fd = file, file.fileno()  # which the file closes with itself
        self._dtype, self._length = token_dtype, length
        self._token_bytes = length * token_dtype.itemsize
        # not of numpy: one number is read at a time
        self._offsets = array("I", os.pread(self._fd, 4 * (samples + 1), 4))
        ends = np.frombuffer(self._offsets, np.uint32).astype(np.int64)
        most = self._token_bytes + LENS_BYTES + 4 * length
        if (
            ends.size != samples + 1
            or not self._token_bytes <= np.diff(ends).min()
            or np.diff(ends).max() > most
            or ends[-1] > os.fstat(self._fd).st_size
        ):
            raise ValueError("they do not lie one after another in the file")

    def read(self, number: int) -> Sample:
        """Raises OSError, ValueError, IndexError or struct.error for a file that is not whole."""
        begin = self._offsets[number]
        data = os.pread(self._fd, self._offsets[number + 1] - begin, begin)
        after = len(data) - self._token_bytes
        tokens: NDArray[Any] = np.frombuffer(data, self._dtype, self._length, after)
        (num_pad,) = NUM_PAD.unpack_from(data, after - 8)
        shape_bytes = 1 << (data[4] & 3)  # of one dimension
        lens_at = 5 + shape_bytes
        count = (after - 8 - lens_at) // 4
        lens = np.frombuffer(data, np.int32, count, lens_at)
        check_lens(lens.tolist(), num_pad, self._length)
        return Sample(tokens, lens, num_pad)


def check_lens(lens: list[int], num_pad: int, length: int) -> None:
    """Raises ValueError unless documents of `lens` tokens, padding included, fill a sample."""
    if sum(lens) != length or min(lens) < 1:
        raise ValueError("its documents have another length")
    if num_pad and num_pad != lens[-1]:
        raise ValueError(f"its padding has another length than {num_pad}")
