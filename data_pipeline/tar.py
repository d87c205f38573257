"""WebDataset shards: tar files that any reader of WebDataset takes, and an index for random access.

A sample is two members, KEY.json (doc_lens, num_pad) and KEY.tokens.npy. Beside shard.N.tar lies
shard.N.offsets.npy, int64 [samples, 4]: begin and size of both in the tar. index.json lists shards
and checksums as that of MDS does.
"""

import io
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from data_pipeline.arrays import read_int64
from data_pipeline.mds import INDEX, check_lens, described
from data_pipeline.packing import Sample
from untrusted.records import parse_json

BLOCK = 512  # of a tar: a header is one, a member's bytes are padded to whole ones
OFFSETS = ".offsets.npy"
HEADER_BYTES = 1 << 12  # of a .npy file, at most
MOST_FIELDS_BYTES = 1 << 7, 12  # of KEY.json: what is in it besides, and of a document's length


class Fields(TypedDict):
    """KEY.json."""

    doc_lens: list[int]
    num_pad: int


FIELDS = TypeAdapter(Fields)


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
        self,
        file: IO[bytes],
        offsets: IO[bytes],
        samples: int,
        token_dtype: np.dtype[Any],
        length: int,
    ) -> None:
        """length: tokens of a sample. Raises OSError, or ValueError for damaged offsets."""
        self._file, self._fd = file, file.fileno()  # which the file closes with itself
        self._offsets = read_int64(offsets, (samples, 4))
        self._dtype, self._length = token_dtype, length
        self._token_bytes = length * token_dtype.itemsize
        begins, sizes = self._offsets[:, ::2], self._offsets[:, 1::2]  # of fields, of tokens
        end = os.fstat(self._fd).st_size
        besides, each = MOST_FIELDS_BYTES
        most = np.array([besides + each * length, self._token_bytes + HEADER_BYTES])
        sound = (begins >= 0) & (begins <= end) & (sizes >= 0) & (sizes <= most)
        gaps = begins[:, 1] - begins[:, 0] - sizes[:, 0]
        if not sound.all() or (sizes[:, 1] < self._token_bytes).any():
            raise ValueError("offsets or sizes that a sample cannot have")
        if not ((gaps >= 0) & (gaps <= 8 * BLOCK)).all() or (begins + sizes).max() > end:
            raise ValueError("they do not lie in the file, a sample's members together")

    def read(self, number: int) -> Sample:
        """Raises OSError, or ValueError, KeyError or IndexError for a file that is not whole."""
        begin, size, tokens_begin, tokens_size = self._offsets[number].tolist()
        data = os.pread(self._fd, tokens_begin + tokens_size - begin, begin)
        fields = parse_json(data[:size], FIELDS, "its .json member", "the shard is damaged")
        # a .npy file ends with its numbers
        tokens: NDArray[Any] = np.frombuffer(
            data, self._dtype, self._length, len(data) - self._token_bytes
        )
        lens = fields["doc_lens"]
        check_lens(lens, fields["num_pad"], self._length)
        return Sample(tokens, np.array(lens, np.int32), fields["num_pad"])
