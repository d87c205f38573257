"""Prepared shards, read by sample index.

MDS shards are read through mosaicml-streaming's reader but not its iterator, which hides faults: a
damaged shard would end one rank's loop without a word and hang the others; WebDataset's through an
index of ours (tar.py), since the library has no random access. Here every shard is
checked against its size and xxh64 before its first sample is used, and what is wrong is raised.
"""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.mds import COLUMNS, HASH, INDEX, MDSReader
from data_pipeline.meta import fingerprint, read_meta
from data_pipeline.packing import Sample
from data_pipeline.tar import TarReader


class PackedDataset:
    """Random access to the samples of one folder; safe to use from several threads.

    `seq_len`, `tokenizer_hash` and `vocab_size` (the model's) are checked when given.
    Raises DataError for a folder that is missing, damaged or does not fit them.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        seq_len: int | None = None,
        tokenizer_hash: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(
                f"{self.folder}: no such folder. Make it with `transxssm prepare`, or correct "
                "data.train / data.validation."
            )
        self.meta = read_meta(self.folder)
        self._check_fit(seq_len, tokenizer_hash, vocab_size)
        self._readers = self._open_index()
        sizes = np.array([reader.samples for reader in self._readers], np.int64)
        self._ends = np.cumsum(sizes)
        if int(sizes.sum()) != self.meta.samples:
            raise DataError(
                f"{self.folder}: {INDEX} counts {int(sizes.sum())} samples, meta.json "
                f"{self.meta.samples}; the folder is mixed from two runs, prepare it again."
            )
        self._verified: set[int] = set()
        self._lock = threading.Lock()

    def _check_fit(self, seq_len: int | None, digest: str | None, vocab_size: int | None) -> None:
        if seq_len is not None and seq_len != self.meta.seq_len:
            raise DataError(
                f"{self.folder}: packed with seq_len {self.meta.seq_len}, but data.seq_len is "
                f"{seq_len}. Set data.seq_len={self.meta.seq_len}, or prepare with --seq-len "
                f"{seq_len}."
            )
        if digest is not None and digest != self.meta.tokenizer_hash:
            raise DataError(
                f"{self.folder}: made with the tokenizer {self.meta.tokenizer_hash[:12]}…, but the "
                f"one in use is {digest[:12]}…; token ids would mean other text. Use the "
                "tokenizer.json beside the shards, or prepare them again."
            )
        if vocab_size is not None and vocab_size < self.meta.vocab_size:
            raise DataError(
                f"{self.folder}: its tokenizer has {self.meta.vocab_size} tokens, but "
                f"model.vocab_size is {vocab_size}; set it to {self.meta.vocab_size} or more."
            )

    def _open_index(self) -> list[Any]:
        """A reader for each shard that index.json lists."""
        file = self.folder / INDEX
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror}); copy the folder again or prepare it."
            ) from error
        if fingerprint(content, self.meta.tokenizer_hash) != self.meta.fingerprint:
            raise DataError(
                f"{file}: does not match the fingerprint in meta.json: one of the two is damaged "
                "or from another run. Copy the folder again or prepare it."
            )
        try:
            shards = json.loads(content)["shards"]
            if self.meta.format == "webdataset":
                return [TarReader(self.folder, shard) for shard in shards]
            readers = [MDSReader.from_json(str(self.folder), None, shard) for shard in shards]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not an index of shards ({error!r}).") from error
        for reader in readers:
            if set(reader.column_names) != COLUMNS or reader.compression:
                raise DataError(
                    f"{file}: columns {reader.column_names}, compression {reader.compression}; "
                    f"expected {sorted(COLUMNS)} uncompressed. Prepare the shards again."
                )
        return readers

    def __len__(self) -> int:
        return self.meta.samples

    @property
    def num_shards(self) -> int:
        return len(self._readers)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of [0, len). Raises DataError naming the shard when it is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        reader = self._readers[shard]
        within = index - int(self._ends[shard]) + reader.samples
        self.verify_shard(shard)
        try:
            fields = reader.get_item(within)
        except Exception as error:  # whatever a damaged file makes the decoder raise
            raise DataError(
                f"{self.folder / reader.raw_data.basename}: sample {within} (number {index} of the "
                f"folder) cannot be decoded ({error!r}). The file changed after it was checked; "
                "copy it again."
            ) from error
        return self._checked(Sample(**fields), index, reader)

    def _checked(self, sample: Sample, index: int, reader: Any) -> Sample:
        """`sample`, if it is what Sample promises."""
        length = self.meta.seq_len + 1
        lens = sample.doc_lens
        if (
            sample.tokens.shape != (length,)
            or lens.min() < 1
            or int(lens.sum()) != length
            or not 0 <= sample.num_pad < length
            or (sample.num_pad and lens[-1] != sample.num_pad)
            or sample.tokens.max() >= self.meta.vocab_size
        ):
            raise DataError(
                f"{self.folder / reader.raw_data.basename}: number {index} of the folder is not a "
                f"sample of {length} tokens below {self.meta.vocab_size} with its document "
                "lengths, though the checksum is right; prepare the shards again."
            )
        return sample

    def verify_shard(self, shard: int) -> None:
        """Check size and xxh64 of shard number `shard`, once in the life of this object."""
        with self._lock:
            if shard in self._verified:
                return
            reader = self._readers[shard]
            self._verify_file(reader.raw_data)
            if self.meta.format == "webdataset":
                self._verify_file(reader.offsets_info)
            self._verified.add(shard)

    def _verify_file(self, info: Any) -> None:
        file = self.folder / info.basename
        digest = xxhash.xxh64()
        size = 0
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror}), but {INDEX} lists it; copy the "
                "shard again or prepare the data anew."
            ) from error
        if size != info.bytes:
            raise DataError(
                f"{file}: {size} bytes, but {INDEX} says {info.bytes}; the shard is cut off or "
                "overwritten. Copy it again or prepare the data anew."
            )
        if digest.hexdigest() != info.hashes.get(HASH):
            raise DataError(
                f"{file}: checksum {HASH} {digest.hexdigest()}, but {INDEX} says "
                f"{info.hashes.get(HASH)}; its content is damaged. Copy it again or prepare "
                "the data anew."
            )
