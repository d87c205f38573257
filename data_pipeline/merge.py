"""Units' shards and counts as one dataset a split."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.claim import FOLDER_MODE
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.meta import FORMAT_VERSION, DatasetMeta, fingerprint
from data_pipeline.shard_index import ShardEntry
from data_pipeline.shard_names import rename_shard, stored_files
from data_pipeline.tokenizer import TextTokenizer
from data_pipeline.unit import Counts, Options, load_index
from untrusted.files import write_durably
from untrusted.numbers import counted
from untrusted.private import check_ours


class EmptySplitError(DataError):
    """A split without a document, of a corpus that has been read to its end."""


def check_all_done(keys: Sequence[str], done: Collection[str]) -> None:
    """Raises DataError if units are missing."""
    missing = [number for number, key in enumerate(keys) if key not in done]
    if missing:
        raise DataError(
            f"{counted(len(missing), 'unit is', 'units are')} not done (the first: number "
            f"{missing[0] + 1} of {len(keys)}); run `prepare` with the same options for every "
            "share before it is merged."
        )


class Totals:
    """Counts by split, and of labels [splits, vocabulary], of units that are added one by one."""

    def __init__(self, splits: Sequence[str], vocab_size: int) -> None:
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in splits}
        self.labels: NDArray[np.int64] = np.zeros((len(splits), vocab_size), np.int64)

    def add(self, counts: Counts, labels: NDArray[np.int64]) -> None:
        """Add a unit."""
        for split, summed in self.counts.items():
            summed.update(counts[split])
        self.labels += labels

    def check(self) -> None:
        """Raises EmptySplitError where a split has no sample, DataError where none has a loss."""
        splits = list(self.counts)
        empty = [split for split, counts in self.counts.items() if not counts["samples"]]
        if empty:
            raise empty_splits(empty, splits)
        for split, labels in zip(splits, self.labels, strict=True):
            if not labels.any():
                raise DataError(
                    f"In the {split} split no token has a loss: each of its documents is no more "
                    "than an end-of-text token. Use a tokenizer that keeps the text (`transxssm "
                    "tokenizer inspect`)."
                )


def empty_splits(empty: Sequence[str], splits: Sequence[str]) -> EmptySplitError:
    """The error of splits without a document."""
    if len(empty) == len(splits):
        return EmptySplitError("The corpus is empty: its files hold no text.")
    return EmptySplitError(
        f"No document fell into the {empty[0]} split. The corpus has too few documents for this "
        "validation fraction: give more (a text file is one, or several with "
        "--document-separator; a line of a .jsonl file is one), or another --validation-fraction "
        "(0: no validation split)."
    )


def describe_split(
    totals: Totals, split: str, index: bytes, tokenizer: TextTokenizer, options: Options
) -> str:
    """meta.json of a split."""
    labels = totals.labels[options.splits.index(split)]
    loss_tokens = int(labels.sum())
    p = labels[labels > 0] / max(1, loss_tokens)
    meta = DatasetMeta(
        format_version=FORMAT_VERSION,
        format=options.format,
        seq_len=options.seq_len,
        packing=options.packing,
        seed=options.seed,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        pad_id=tokenizer.pad_id,
        **totals.counts[split],
        loss_tokens=loss_tokens,
        unigram_entropy=float(-(p * np.log(p)).sum()),
        fingerprint=fingerprint(index, tokenizer.hash),
    )
    left_out = None if meta.empty_rows else {"empty_rows"}
    return json.dumps(meta.model_dump(exclude=left_out), indent=2) + "\n"


def move_shards(sources: Iterable[Path], target: Path) -> bytes:
    """Number the units' shards through and move them to `target`; its index.json.

    Raises DataError for damaged units, UnsafeFileError for a `target` that is not of this user.
    """
    with suppress(FileExistsError):
        target.mkdir(FOLDER_MODE)
    check_ours(target)
    shards: list[ShardEntry] = []
    for source in sources:
        for shard in load_index(source):
            stored = [file["basename"] for file in stored_files(shard)]
            for old, new in rename_shard(shard, f"shard.{len(shards):06d}").items():
                if (source / old).exists():
                    os.rename(source / old, target / new)
                elif old in stored and not (target / new).exists():
                    raise DataError(
                        f"{source / old}: is missing; remove {source.parents[2]} and prepare again."
                    )
            shards.append(shard)
    index = index_of(shards)
    write_durably(target / INDEX, index)
    return index


def index_of(shards: list[ShardEntry]) -> bytes:
    """index.json, the same bytes for the same shards."""
    return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()
