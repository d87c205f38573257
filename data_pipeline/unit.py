"""One unit of `prepare`'s work: its documents, tokenised, packed and written as shards of its own.

Packing and shards end with the unit, so what a unit becomes depends on its documents alone. A unit
is written beside its place and renamed when it is whole.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, cast

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from data_pipeline.arrays import read_labels
from data_pipeline.corpus import Piece
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX, described, open_writer
from data_pipeline.meta import Format, token_dtype
from data_pipeline.packing import Packing, PackingCounts, Sample, make_packer
from data_pipeline.reading import Document, TextField, unit_documents
from data_pipeline.shard_index import FileEntry, ShardEntry, read_index
from data_pipeline.shard_names import check_ours
from data_pipeline.tar import TarShardWriter
from data_pipeline.tokenizer import TextTokenizer
from untrusted.errors import UntrustedError
from untrusted.files import read_regular
from untrusted.records import MAX_BYTES, Count, read_json

BATCH_BYTES = 1 << 21  # text tokenised at once; bounds memory and feeds the tokenizer's threads
COUNTS, LABELS = "counts.json", "labels.npz"
ZSTD_LEVEL = 3
Compression = Literal["none", "zstd"]


class SplitCounts(TypedDict):
    """PackingCounts, as counts.json has them, and rows of the unit without text (of the first
    split alone)."""

    documents: Count
    cut_documents: Count
    samples: Count
    tokens: Count
    padding: Count
    empty_rows: NotRequired[Count]


Counts = dict[str, SplitCounts]  # by split
COUNTS_FILE = TypeAdapter(Counts)


@dataclass(frozen=True)
class Options:
    """What shards depend on, besides the text and the tokenizer."""

    seq_len: int
    packing: Packing
    validation_fraction: float
    text_field: TextField
    seed: int
    shard_bytes: int
    format: Format
    compression: Compression = "none"
    document_separator: str = ""
    strict: bool = False

    @property
    def splits(self) -> list[str]:
        return ["train"] + ["validation"] * (self.validation_fraction > 0)

    def split_of(self, document: Document) -> str:
        """The split that a document belongs to, by its name alone."""
        name = f"{self.seed}:{document.id}".encode("utf-8", "surrogateescape")
        share = xxhash.xxh64_intdigest(name) / 2**64
        return "validation" if share < self.validation_fraction else "train"

    def documents(
        self, pieces: Sequence[Piece], empty: Counter[str] | None = None
    ) -> Iterator[Document]:
        """Documents of pieces, in order [see unit_documents]. Raises DataError."""
        return unit_documents(
            pieces,
            self.text_field,
            separator=self.document_separator,
            strict=self.strict,
            empty=empty,
        )

    def identity(self) -> dict[str, Any]:
        """What tells one unit's work from another's; the same as before for options of before."""
        new = {"document_separator": "", "strict": False}
        return {n: value for n, value in asdict(self).items() if n not in new or value != new[n]}


@dataclass(frozen=True)
class Done:
    """What has been done since the last report."""

    num_bytes: int  # of input
    documents: int
    tokens: int


def write_unit(
    folder: Path,
    unit: Sequence[Piece],
    tokenizer: TextTokenizer,
    options: Options,
    report: Callable[[Done], None],
) -> None:
    """Make `folder`: a folder of shards a split that got text, counts.json and labels.npz.

    Raises DataError for bad input, OSError when it cannot be written; `folder` is not there then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    splits = {name: SplitWriter(temporary / name, tokenizer, options) for name in options.splits}
    empty: Counter[str] = Counter()
    try:
        for batch, tokens, done in _encoded(_batches(unit, options, empty), tokenizer):
            for document, ids in zip(batch, tokens, strict=True):
                splits[options.split_of(document)].add(ids, document.ends)
                done = Done(done.num_bytes, done.documents, done.tokens + len(ids))
            report(done)
        counts = {name: asdict(split.finish()) for name, split in splits.items()}
        if empty.total():
            counts[options.splits[0]]["empty_rows"] = empty.total()
    except BaseException:
        for split in splits.values():
            split.cancel()
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    labels = np.stack([splits[name].label_counts for name in options.splits])
    np.savez_compressed(temporary / LABELS, labels=labels)
    (temporary / COUNTS).write_text(json.dumps(counts))
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)  # somebody else has done this unit meanwhile


def load_labels(folder: Path, shape: tuple[int, int]) -> NDArray[np.int64]:
    """How often each token is a label in a unit that is done: [splits, vocabulary]. Raises
    DataError."""
    return read_labels(folder / LABELS, str(folder / LABELS), shape)


def load_counts(folder: Path, splits: Sequence[str]) -> Counts:
    """Return the counts of a unit that is done, by split. Raises DataError."""
    remedy = "remove the unit's folder and run the same command again"
    try:
        counts = read_json(folder / COUNTS, COUNTS_FILE, remedy)
    except (UntrustedError, FileNotFoundError) as error:
        raise DataError(str(error)) from error
    if set(counts) != set(splits):
        raise DataError(f"{folder / COUNTS} has the splits {sorted(counts)!r:.300}; {remedy}.")
    return counts


def load_index(folder: Path) -> list[ShardEntry]:
    """Return the shards of one split of a unit, none if no document fell into it. Raises
    DataError."""
    file = folder / INDEX
    if folder.is_symlink():
        raise DataError(f"{folder} is a link, not a folder; remove it and prepare again.")
    if not file.exists():
        return []
    try:
        shards = read_index(read_regular(file, MAX_BYTES), str(file))
    except (UntrustedError, OSError) as error:
        raise DataError(f"{error}") from error
    check_ours(shards, str(file))
    return shards


def _batches(
    unit: Sequence[Piece], options: Options, empty: Counter[str]
) -> Iterator[tuple[list[Document], Done]]:
    """Documents in lists of about BATCH_BYTES, with the input's bytes and documents they are.

    A part of a long document is counted when it is the last."""
    batch: list[Document] = []
    size = reported = 0
    for piece in unit:
        read = 0
        for document in options.documents([piece], empty):
            batch.append(document)
            size += document.num_bytes
            # what is compressed has more text than bytes
            before, read = read, min(piece.num_bytes, read + document.num_bytes)
            reported += read - before
            if size >= BATCH_BYTES:
                yield batch, Done(reported, sum(document.ends for document in batch), 0)
                batch, size, reported = [], 0, 0
        reported += piece.num_bytes - read
    if batch or reported:
        yield batch, Done(reported, sum(document.ends for document in batch), 0)


def _encoded(
    batches: Iterator[tuple[list[Document], Done]], tokenizer: TextTokenizer
) -> Iterator[tuple[list[Document], list[list[int]], Done]]:
    """With token ids; the next batch is tokenised while the caller works on one."""
    ahead: tuple[list[Document], Future[list[list[int]]], Done] | None = None
    with ThreadPoolExecutor(1) as pool:
        for batch, done in batches:
            texts = [document.text for document in batch]
            now, ahead = ahead, (batch, pool.submit(tokenizer.encode_batch, texts), done)
            if now is not None:
                yield now[0], now[1].result(), now[2]
        if ahead is not None:
            yield ahead[0], ahead[1].result(), ahead[2]


class SplitWriter:
    """Packs and writes one split of a unit, counting on the way."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer, options: Options) -> None:
        self.folder, self.options = folder, options
        self.packer = make_packer(
            options.packing, options.seq_len, tokenizer.eod_id, tokenizer.pad_id
        )
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.writer: Any = None  # opened with the first sample: a unit may have none
        self.label_counts: NDArray[np.int64] = np.zeros(tokenizer.vocab_size, np.int64)

    def add(self, ids: list[int], ends: bool) -> None:
        """Take a document's token ids, or part of them: it `ends` with the last."""
        self._write(self.packer.add(ids, ends))

    def _write(self, samples: list[Sample]) -> None:
        length = self.options.seq_len + 1
        for sample in samples:
            if self.writer is None:
                self.writer = self._open_writer()
            is_label = np.ones(length, bool)
            is_label[np.cumsum(sample.doc_lens) - sample.doc_lens] = False  # first of a piece
            is_label[length - sample.num_pad :] = False
            labels = sample.tokens[is_label]
            self.label_counts += np.bincount(labels, minlength=self.label_counts.size)
            self.writer.write(
                {
                    "tokens": sample.tokens.astype(self.dtype),
                    "doc_lens": sample.doc_lens,
                    "num_pad": sample.num_pad,
                }
            )

    def _open_writer(self) -> Any:
        shard_bytes = self.options.shard_bytes
        if self.options.format == "webdataset":
            return TarShardWriter(self.folder, shard_bytes)
        return open_writer(str(self.folder), self.dtype.name, self.options.seq_len, shard_bytes)

    def finish(self) -> PackingCounts:
        """Write the rest and the index."""
        self._write(self.packer.finish())
        if self.writer is not None:
            self.writer.finish()
            if self.options.compression == "zstd":
                compress_shards(self.folder)
        return self.packer.counts

    def cancel(self) -> None:
        """Stop the writer's threads; what it wrote is the caller's to remove."""
        if self.writer is not None:
            self.writer.cancel_future_jobs()


def compress_shards(folder: Path) -> None:
    """Replace every shard by FILE.zstd, as mosaicml-streaming names it, and say so in index.json.

    One thread each: with several, the bytes would depend on their number.
    """
    shards = load_index(folder)
    compressor = zstandard.ZstdCompressor(ZSTD_LEVEL)
    for shard in shards:
        raw = folder / shard["raw_data"]["basename"]
        packed = raw.with_name(f"{raw.name}.zstd")
        packed.write_bytes(compressor.compress(raw.read_bytes()))
        raw.unlink()
        shard["compression"] = f"zstd:{ZSTD_LEVEL}"
        shard["zip_data"] = cast(FileEntry, described(packed))
    index = {"version": 2, "shards": shards}
    (folder / INDEX).write_text(json.dumps(index, sort_keys=True))
