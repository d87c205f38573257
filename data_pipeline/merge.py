"""Units' shards and counts as one dataset a split."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.meta import FORMAT_VERSION, DatasetMeta, fingerprint
from data_pipeline.shard_names import rename_shard, stored_files
from data_pipeline.tokenizer import TextTokenizer
from data_pipeline.unit import Options


def check_all_done(missing: list[int]) -> None:
    """Raises DataError if there are `missing` units."""
    if missing:
        raise DataError(
            f"{len(missing)} units are not done (the first: {missing[0]:06d}); run `prepare` with "
            "the same options for every share before it is merged"
        )


def sum_counts(counts: list[dict[str, dict[str, int]]], split: str) -> dict[str, int]:
    """A split's counts over all units. Raises DataError where it has no sample."""
    fields = ("documents", "cut_documents", "samples", "tokens", "padding")
    summed = {field: sum(unit[split][field] for unit in counts) for field in fields}
    if not summed["samples"]:
        raise DataError(
            f"No document fell into the {split} split. The corpus has too few documents for this "
            "validation fraction: give more (a line of a .jsonl file is one), or another "
            "--validation-fraction (0: no validation split)."
        )
    return summed


def describe_split(
    summed: dict[str, int],
    labels: NDArray[np.int64],
    index: bytes,
    tokenizer: TextTokenizer,
    options: Options,
) -> str:
    """meta.json of a split."""
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
        **summed,
        loss_tokens=loss_tokens,
        unigram_entropy=float(-(p * np.log(p)).sum()),
        fingerprint=fingerprint(index, tokenizer.hash),
    )
    return json.dumps(meta.model_dump(), indent=2) + "\n"


def move_shards(sources: list[Path], target: Path) -> bytes:
    """Number the units' shards through and move them to `target`; its index.json."""
    target.mkdir(exist_ok=True)
    shards: list[dict[str, Any]] = []
    for source in sources:
        if not (source / INDEX).exists():  # no document of this unit fell into this split
            continue
        for shard in json.loads((source / INDEX).read_bytes())["shards"]:
            stored = [file["basename"] for file in stored_files(shard)]
            for old, new in rename_shard(shard, f"shard.{len(shards):06d}").items():
                if (source / old).exists():
                    os.rename(source / old, target / new)
                elif old in stored and not (target / new).exists():
                    raise DataError(
                        f"{source / old}: is missing; remove {source.parents[2]} and prepare anew."
                    )
            shards.append(shard)
    index = index_of(shards)
    (target / INDEX).write_bytes(index)
    return index


def index_of(shards: list[dict[str, Any]]) -> bytes:
    """index.json, the same bytes for the same shards."""
    return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()
