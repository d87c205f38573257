"""Prepared shards, read by sample index.

The library's iterators hide faults: a damaged shard would end one rank's loop without a word and
hang the others (mosaicml-streaming), or be passed over (webdataset). Here every shard is checked
before its first sample is used, and what is wrong is raised.
"""

import hashlib
import struct
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import BadFileError, BadShardError, DataError
from data_pipeline.mds import INDEX, MdsShard, columns
from data_pipeline.meta import META, DatasetMeta, fingerprint, parse_meta, token_dtype
from data_pipeline.packing import Sample
from data_pipeline.remote import is_remote
from data_pipeline.shard_index import ShardInfo, read_index, shard_infos
from data_pipeline.storage import Cache, Storage
from data_pipeline.tar import TarShard
from data_pipeline.tokenizer import differing_tokenizers

MAX_OPEN = 256  # shards with an open file, of a process
UNDECODABLE = (OSError, ValueError, KeyError, IndexError, struct.error)


class PackedDataset:
    """Random access to the samples of one folder or URL; safe to use from several threads.

    `seq_len`, `vocab_size` (the model's) and `tokenizer` (the content of the tokenizer.json in use)
    are checked when given.
    Raises DataError for a folder that is missing, damaged or does not fit them.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        seq_len: int | None = None,
        tokenizer: bytes | None = None,
        vocab_size: int | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.folder = str(folder).rstrip("/")
        if not is_remote(self.folder) and not Path(self.folder).is_dir():
            raise DataError(
                f"{self.folder}: no such folder. Make it with `transxssm prepare`, or correct "
                "data.train / data.validation."
            )
        self._storage = Storage(self.folder, cache or Cache())
        self.meta: DatasetMeta = parse_meta(self._description(META), self._storage.name(META))
        self._check_fit(seq_len, tokenizer, vocab_size)
        self.dtype = token_dtype(self.meta.vocab_size)
        self.shards = self._read_index()
        counted = sum(shard.samples for shard in self.shards)
        if counted != self.meta.samples:
            raise DataError(
                f"{self.folder}: {INDEX} counts {counted} samples, meta.json {self.meta.samples}; "
                "the folder is mixed from two runs, prepare it again."
            )
        sizes = np.array([shard.samples for shard in self.shards], np.int64)
        self._ends = np.cumsum(sizes)
        self._begins = self._ends - sizes
        self._open: dict[int, MdsShard | TarShard] = {}
        self._skipped: set[int] = set()
        self._lock = threading.Lock()

    def _description(self, name: str) -> bytes:
        try:
            return self._storage.read(name)
        except OSError as error:
            raise DataError(
                f"{self._storage.name(name)}: cannot be read ({error.strerror}). A folder of "
                "shards is what `transxssm prepare` wrote, OUT/train or OUT/validation; copy it "
                "again or prepare it."
            ) from error

    def _check_fit(
        self, seq_len: int | None, tokenizer: bytes | None, vocab_size: int | None
    ) -> None:
        if seq_len is not None and seq_len != self.meta.seq_len:
            raise DataError(
                f"{self.folder}: packed with seq_len {self.meta.seq_len}, but data.seq_len is "
                f"{seq_len}. Set data.seq_len={self.meta.seq_len}, or prepare with --seq-len "
                f"{seq_len}."
            )
        different = [] if tokenizer is None else self.differing_tokenizer(tokenizer)
        if different:
            raise DataError(
                f"{self.folder}: made with another tokenizer than the one in use (they differ in "
                f"{', '.join(different)}); token ids would mean other text. Use the tokenizer.json "
                "beside the shards, or prepare them again."
            )
        if vocab_size is not None and vocab_size < self.meta.vocab_size:
            raise DataError(
                f"{self.folder}: its tokenizer has {self.meta.vocab_size} tokens, but "
                f"model.vocab_size is {vocab_size}; set it to {self.meta.vocab_size} or more."
            )

    @property
    def tokenizer_name(self) -> str:
        """Path or URL of the tokenizer.json that `prepare` put beside the splits."""
        return self._beside().name("tokenizer.json")

    def _beside(self) -> Storage:
        parent, _, _ = self.folder.rpartition("/")
        return Storage(parent or ".", self._storage.cache)

    def differing_tokenizer(self, content: bytes) -> list[str]:
        """Names of what decides ids in which a tokenizer.json differs from the one that the data
        was prepared with; none for the same tokenizer, whatever the files' bytes. Raises
        DataError."""
        if hashlib.sha256(content).hexdigest() == self.meta.tokenizer_hash:
            return []
        return differing_tokenizers(
            self.tokenizer(), content, (self.tokenizer_name, "the tokenizer in use")
        )

    def fingerprint_with(self, tokenizer_hash: str) -> str:
        """The fingerprint of the same samples, had a tokenizer.json of that hash been used."""
        return fingerprint(self._description(INDEX), tokenizer_hash)

    def tokenizer(self) -> bytes:
        """Return the tokenizer.json that `prepare` put beside the splits. Raises DataError."""
        name = self.tokenizer_name
        try:
            content = self._beside().read("tokenizer.json")
        except OSError as error:
            raise DataError(
                f"{name}: cannot be read ({error.strerror}), and checkpoints carry the tokenizer; "
                "copy the tokenizer.json that the data was prepared with there."
            ) from error
        if hashlib.sha256(content).hexdigest() != self.meta.tokenizer_hash:
            raise DataError(
                f"{name}: not the tokenizer that {self.folder} was prepared with, or that one "
                "written differently (its SHA-256 is not that of meta.json); copy that one there."
            )
        return content

    def _read_index(self) -> list[ShardInfo]:
        name, content = self._storage.name(INDEX), self._description(INDEX)
        if fingerprint(content, self.meta.tokenizer_hash) != self.meta.fingerprint:
            raise DataError(
                f"{name}: does not match the fingerprint in meta.json: one of the two is damaged "
                "or from another run. Copy the folder again or prepare it."
            )
        expected = (
            columns(self.dtype.name, self.meta.seq_len) if self.meta.format == "mds" else None
        )
        sample_bytes = (self.meta.seq_len + 1) * self.dtype.itemsize
        return shard_infos(read_index(content, name), name, expected, sample_bytes)

    @property
    def name(self) -> str:
        """Last part of the folder's path or URL."""
        return self.folder.rpartition("/")[2]

    @property
    def is_copied(self) -> bool:
        """Whether shards are read from copies on this node."""
        return self._storage.remote or any(shard.packed for shard in self.shards)

    def __len__(self) -> int:
        return self.meta.samples

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of [0, len). Raises BadShardError naming the shard when it is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        return self.read(np.array([index]))[0]

    def read(self, indices: NDArray[np.int64]) -> list[Sample]:
        """Samples of these indices [m], m > 0, each in [0, len). Raises BadShardError."""
        shards = self._shards_of(indices)
        numbers = indices - self._begins[shards]
        return [self._sample(*at) for at in zip(shards.tolist(), numbers.tolist(), strict=True)]

    def _shards_of(self, indices: NDArray[np.int64]) -> NDArray[np.intp]:
        return self._ends.searchsorted(indices, "right")

    def _sample(self, shard: int, number: int) -> Sample:
        if shard in self._skipped:
            return self._blank()
        reader = self._open.get(shard) or self._opened(shard)
        try:
            return self._read_from(reader, number)
        except UNDECODABLE:
            return self._read_again(shard, number)

    def _read_again(self, shard: int, number: int) -> Sample:
        """A sample that could not be decoded: its file has changed since it was checked. Checked
        again, a copy is fetched again and a bad shard is named."""
        reader = self._opened(shard, recheck=True)
        try:
            return self._read_from(reader, number)
        except UNDECODABLE as error:
            raise self._undecodable(shard, f"sample {number}", error) from error

    def _read_from(self, reader: MdsShard | TarShard, number: int) -> Sample:
        sample = reader.read(number)
        largest = int(sample.tokens.max())
        if largest >= self.meta.vocab_size:
            raise ValueError(f"token {largest} of a vocabulary of {self.meta.vocab_size}")
        return sample

    def _undecodable(self, shard: int, what: str, why: object) -> BadShardError:
        name = self._storage.name(self.shards[shard].raw.name)
        return BadShardError(
            f"{name}: {what} cannot be decoded ({why}), though its checksum is right; prepare the "
            "data again.",
            self.folder,
            shard,
        )

    def _blank(self) -> Sample:
        """All padding."""
        length = self.meta.seq_len + 1
        tokens = np.full(length, self.meta.pad_id, self.dtype)
        return Sample(tokens, np.array([length], np.int32), length)

    def _opened(self, shard: int, *, recheck: bool = False) -> MdsShard | TarShard:
        """A reader of a shard that has been checked. Raises BadShardError, or DataError for a fault
        of this node."""
        info, length = self.shards[shard], self.meta.seq_len + 1
        try:
            file = self._storage.open(info.raw, info.packed, recheck=recheck)
            if info.offsets is None:
                reader: MdsShard | TarShard = MdsShard(file, info.samples, self.dtype, length)
            else:
                offsets = self._storage.open(info.offsets, recheck=recheck)
                reader = TarShard(file, offsets, info.samples, self.dtype, length)
        except BadFileError as error:
            raise BadShardError(str(error), self.folder, shard) from error
        except (OSError, ValueError) as error:
            raise self._undecodable(shard, "where its samples are", error) from error
        with self._lock:
            while len(self._open) >= MAX_OPEN:
                # readers at work keep theirs until they are done
                self._open.pop(next(iter(self._open)), None)
            self._open[shard] = reader
        return reader

    def close(self) -> None:
        """Close the files; reading opens them again."""
        with self._lock:
            self._open.clear()

    def make_ready(self, indices: NDArray[np.int64]) -> None:
        """Have the shards of these samples on this node, checked, before they are read."""
        for shard in np.unique(self._shards_of(indices)).tolist():
            if shard not in self._open and shard not in self._skipped:
                self._opened(shard)

    def skip(self, shard: int) -> None:
        """From now on the samples of a shard are all padding. Raises DataError if none is left."""
        self._skipped.add(shard)
        if len(self._skipped) == len(self.shards):
            raise DataError(f"{self.folder}: none of its {len(self.shards)} shards can be read.")


def refuse_without_loss(dataset: PackedDataset) -> None:
    """Raise DataError for data in which no token has a loss, of which nothing can be learned."""
    if dataset.meta.loss_tokens == 0:
        raise DataError(
            f"{dataset.folder}: none of its {dataset.meta.tokens:,} tokens has a loss (loss_tokens "
            f"in {META}): each document is no more than its end-of-text token. Prepare the data "
            "with a tokenizer that keeps its text."
        )
