"""WebDataset shards: tar files that any reader of WebDataset takes, and an index for random access.

A sample is two members, KEY.json (doc_lens, num_pad) and KEY.tokens.npy. Beside shard.N.tar lies
shard.N.offsets.npy, int64 [samples, 4]: begin and size of both in the tar. index.json lists shards
and checksums as that of MDS does.
"""

import io
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.mds import INDEX, described
from data_pipeline.packing import Sample

BLOCK = 512  # of a tar: a header is one, a member's bytes are padded to whole ones
OFFSETS = ".offsets.npy"
DECODER = json.JSONDecoder()  # json.loads takes twice the time of so short a text


class TarShardWriter:
    """Writes samples into shards of about `shard_bytes`; the same samples give the same bytes."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[dict[str, Any]] = []
        self._tar: Any = None
        self._offsets: list[tuple[int, int, int, int]] = []
        self._samples = 0

    def write(self, sample: dict[str, Any]) -> None:
        """tokens [seq_len + 1], doc_lens int32 [pieces], num_pad."""
        if self._tar is None:
            from webdataset import TarWriter  # late: it imports torch

            path = str(self.folder / f"shard.{len(self.shards):06d}.tar")
            self._tar = TarWriter(path, encoder=False, mtime=0, compress=False)
        fields = {"doc_lens": sample["doc_lens"].tolist(), "num_pad": int(sample["num_pad"])}
        described, buffer = json.dumps(fields).encode(), io.BytesIO()
        np.save(buffer, sample["tokens"])
        tokens = buffer.getvalue()
        begin = self._tar.tarstream.offset + BLOCK
        after = begin + -(-len(described) // BLOCK) * BLOCK + BLOCK
        self._offsets.append((begin, len(described), after, len(tokens)))
        key = f"{self._samples:09d}"
        self._tar.write({"__key__": key, "json": described, "tokens.npy": tokens})
        self._samples += 1
        if self._tar.tarstream.offset >= self.shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        self._tar.close()
        self._tar = None
        path = self.folder / f"shard.{len(self.shards):06d}.tar"
        np.save(path.with_suffix(OFFSETS), np.array(self._offsets, np.int64))
        self.shards.append(
            {
                "format": "webdataset",
                "samples": len(self._offsets),
                "raw_data": described(path),
                "offsets": described(path.with_suffix(OFFSETS)),
            }
        )
        self._offsets = []

    def finish(self) -> None:
        """Close the last shard and write index.json."""
        if self._tar is not None:
            self._close_shard()
        index = {"version": 2, "shards": self.shards}
        (self.folder / INDEX).write_text(json.dumps(index, sort_keys=True))

    def cancel_future_jobs(self) -> None:
        """Close what is open; the files are the caller's to remove."""
        if self._tar is not None:
            self._tar.close()


class TarShard:
    """One shard's samples by number; safe to use from several threads."""

    def __init__(
        self, file: FileIO, offsets: FileIO, token_dtype: np.dtype[Any], length: int
    ) -> None:
        """length: tokens of a sample. Raises OSError, or ValueError for damaged offsets."""
        self._file, self._fd = file, file.fileno()  # which the file closes with itself
        self._offsets = np.load(offsets)
        self._dtype, self._length = token_dtype, length
        self._token_bytes = length * token_dtype.itemsize

    def read(self, number: int) -> Sample:
        """Raises OSError, or ValueError, KeyError or IndexError for a file that is not whole."""
        begin, size, tokens_begin, tokens_size = self._offsets[number].tolist()
        data = os.pread(self._fd, tokens_begin + tokens_size - begin, begin)
        fields, _ = DECODER.raw_decode(data[:size].decode())
        # a .npy file ends with its numbers
        tokens: NDArray[Any] = np.frombuffer(
            data, self._dtype, self._length, len(data) - self._token_bytes
        )
        lens = fields["doc_lens"]
        if sum(lens) != self._length:
            raise ValueError("its documents have another length")
        return Sample(tokens, np.array(lens, np.int32), fields["num_pad"])
