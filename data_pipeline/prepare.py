"""Text to shards: OUT/train and OUT/validation, each MDS shards with index.json and meta.json.

    documents → split by hash of (seed, id) → tokens → packed samples → shards

A document's split depends on the seed and its own name alone. Everything is written to OUT.tmp and
renamed at the end, so OUT exists whole or not at all. The same input gives the same bytes.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.corpus import Document, documents, input_files
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX, open_writer
from data_pipeline.meta import FORMAT_VERSION, META, DatasetMeta, fingerprint
from data_pipeline.packing import Packing, Sample, make_packer
from data_pipeline.tokenizer import TextTokenizer, load_tokenizer

SHARD_BYTES = 1 << 26
BATCH_BYTES = 1 << 20  # text tokenised at once; bounds memory and feeds the tokenizer's threads
MARKER = ".transxssm-prepare"  # tells our own left-over OUT.tmp from a stranger's folder


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is."""

    bytes_done: int
    bytes_total: int
    documents: int
    tokens: int
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes_done / 1e6 / max(self.seconds, 1e-9)


def prepare(
    inputs: Sequence[Path | str],
    tokenizer_path: Path,
    out: Path,
    seq_len: int,
    packing: Packing = "best_fit",
    validation_fraction: float = 0.02,
    text_field: str = "text",
    seed: int = 1234,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, DatasetMeta]:
    """Tokenise, pack and write the corpus `inputs`; returns each split's meta.

    `progress` is called about once a megabyte. Raises DataError for bad input, an `out` that holds
    anything, a split without documents and a full disk; `out` then does not exist.
    """
    if seq_len < 1 or not 0 <= validation_fraction < 1:
        raise DataError(
            f"seq_len={seq_len}, validation_fraction={validation_fraction}: seq_len must be at "
            "least 1 and validation_fraction lie in [0, 1)."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder; remove it or name another.")
    tokenizer = load_tokenizer(tokenizer_path)
    temporary = _fresh_folder(out.with_name(out.name + ".tmp"))
    try:
        shutil.copyfile(tokenizer.file, temporary / "tokenizer.json")
        names = ["train"] + ["validation"] * (validation_fraction > 0)
        splits = {n: SplitWriter(temporary / n, tokenizer, seq_len, packing, seed) for n in names}
        try:
            _fill(splits, inputs, tokenizer, validation_fraction, text_field, seed, progress)
            metas = {name: split.finish() for name, split in splits.items()}
        except BaseException:
            for split in splits.values():
                split.cancel()
            raise
        (temporary / MARKER).unlink()
        os.rename(temporary, out)  # replaces an empty folder
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); nothing is left there. Free space or "
            "mend permissions and run again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return metas


def _fresh_folder(temporary: Path) -> Path:
    """An empty `temporary`, in place of what a killed run may have left there."""
    if temporary.exists():
        if not (temporary / MARKER).exists():
            raise DataError(f"{temporary} is in the way and not from `prepare`; move it elsewhere.")
        shutil.rmtree(temporary)
    try:
        temporary.mkdir(parents=True)
        (temporary / MARKER).touch()
    except OSError as error:
        raise DataError(f"{temporary}: cannot be created ({error.strerror}).") from error
    return temporary


class SplitWriter:
    """Packs and writes one split, counting on the way."""

    def __init__(
        self, folder: Path, tokenizer: TextTokenizer, seq_len: int, packing: Packing, seed: int
    ) -> None:
        self.folder, self.tokenizer, self.seq_len, self.packing = (
            folder,
            tokenizer,
            seq_len,
            packing,
        )
        self.seed = seed
        self.packer = make_packer(packing, seq_len, tokenizer.eod_id, tokenizer.pad_id)
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.writer = open_writer(str(folder), self.dtype.name, seq_len, SHARD_BYTES)
        self.label_counts = np.zeros(tokenizer.vocab_size, np.int64)

    def add(self, ids: list[int]) -> None:
        """Take a document's token ids."""
        self._write(self.packer.add(ids))

    def _write(self, samples: list[Sample]) -> None:
        for sample in samples:
            is_label = np.ones(self.seq_len + 1, bool)
            is_label[np.cumsum(sample.doc_lens) - sample.doc_lens] = False  # first of a piece
            is_label[self.seq_len + 1 - sample.num_pad :] = False
            labels = sample.tokens[is_label]
            self.label_counts += np.bincount(labels, minlength=self.label_counts.size)
            self.writer.write(
                {
                    "tokens": sample.tokens.astype(self.dtype),
                    "doc_lens": sample.doc_lens,
                    "num_pad": sample.num_pad,
                }
            )

    def finish(self) -> DatasetMeta:
        """Write the rest, the index and meta.json. Raises DataError for a split without text."""
        self._write(self.packer.finish())
        counts = self.packer.counts
        if not counts.samples:
            raise DataError(
                f"No document fell into the {self.folder.name} split. The corpus has too few "
                "documents for this validation fraction: give more (a line of a .jsonl file is "
                "one), or another --validation-fraction (0: no validation split)."
            )
        self.writer.finish()
        index = (self.folder / INDEX).read_bytes()
        loss_tokens = int(self.label_counts.sum())
        p = self.label_counts[self.label_counts > 0] / max(1, loss_tokens)
        meta = DatasetMeta(
            format_version=FORMAT_VERSION,
            seq_len=self.seq_len,
            packing=self.packing,
            seed=self.seed,
            tokenizer_hash=self.tokenizer.hash,
            vocab_size=self.tokenizer.vocab_size,
            eod_id=self.tokenizer.eod_id,
            pad_id=self.tokenizer.pad_id,
            samples=counts.samples,
            documents=counts.documents,
            cut_documents=counts.cut_documents,
            tokens=counts.tokens,
            padding=counts.padding,
            loss_tokens=loss_tokens,
            unigram_entropy=float(-(p * np.log(p)).sum()),
            fingerprint=fingerprint(index, self.tokenizer.hash),
        )
        (self.folder / META).write_text(json.dumps(meta.model_dump(), indent=2) + "\n")
        return meta

    def cancel(self) -> None:
        """Stop the writer's threads; what it wrote is the caller's to remove."""
        self.writer.cancel_future_jobs()


def _fill(
    splits: dict[str, SplitWriter],
    inputs: Sequence[Path | str],
    tokenizer: TextTokenizer,
    validation_fraction: float,
    text_field: str,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Send every document, tokenised, to its split."""
    bytes_total = sum(path.stat().st_size for _, path in input_files(inputs)) if progress else 0
    started, bytes_done, count, tokens = time.monotonic(), 0, 0, 0
    for batch in _batches(documents(inputs, text_field)):
        for document, ids in zip(
            batch, tokenizer.encode_batch([d.text for d in batch]), strict=True
        ):
            share = xxhash.xxh64_intdigest(f"{seed}:{document.id}") / 2**64
            splits["validation" if share < validation_fraction else "train"].add(ids)
            bytes_done, tokens = bytes_done + document.num_bytes, tokens + len(ids)
        count += len(batch)
        if progress:
            seconds = time.monotonic() - started
            progress(Progress(bytes_done, bytes_total, count, tokens, seconds))


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_BYTES."""
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += document.num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
