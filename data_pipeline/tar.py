"""WebDataset shards: tar files that any reader of WebDataset takes, and an index for random access.

A sample is two members, KEY.json (doc_lens, num_pad) and KEY.tokens.npy. Beside shard.N.tar lies
shard.N.offsets.npy, int64 [samples, 4]: begin and size of both in the tar. index.json lists shards
and checksums as that of MDS does.
"""

import io
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.mds import HASH, INDEX

BLOCK = 512  # of a tar: a header is one, a member's bytes are padded to whole ones
OFFSETS = ".offsets.npy"


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
                "raw_data": _described(path),
                "offsets": _described(path.with_suffix(OFFSETS)),
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


def _described(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    digest = xxhash.xxh64(content).hexdigest()
    return {"basename": path.name, "bytes": len(content), "hashes": {HASH: digest}}


@dataclass(frozen=True)
class FileInfo:
    """A file that index.json lists."""

    basename: str
    bytes: int
    hashes: dict[str, str]


class TarReader:
    """One shard, read by sample number; safe to use from several threads."""

    def __init__(self, folder: Path, shard: dict[str, Any]) -> None:
        self.samples = int(shard["samples"])
        self.raw_data = FileInfo(**shard["raw_data"])
        self.offsets_info = FileInfo(**shard["offsets"])
        self._folder, self._lock = folder, threading.Lock()
        self._file: int | None = None
        self._offsets: NDArray[np.int64] | None = None

    def get_item(self, number: int) -> dict[str, Any]:
        """tokens, doc_lens and num_pad of a sample."""
        file, offsets = self._opened()
        begin, size, tokens_begin, tokens_size = (int(n) for n in offsets[number])
        fields = json.loads(os.pread(file, size, begin))
        tokens = np.load(io.BytesIO(os.pread(file, tokens_size, tokens_begin)))
        lens = np.array(fields["doc_lens"], np.int32)
        return {"tokens": tokens, "doc_lens": lens, "num_pad": fields["num_pad"]}

    def _opened(self) -> tuple[int, NDArray[np.int64]]:
        with self._lock:
            if self._file is None or self._offsets is None:
                self._offsets = np.load(self._folder / self.offsets_info.basename)
                self._file = os.open(self._folder / self.raw_data.basename, os.O_RDONLY)
            return self._file, self._offsets

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)
