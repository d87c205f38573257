"""Looking into prepared data: what `transxssm data inspect` and `data verify` do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from data_pipeline.dataset import PackedDataset, token_counts
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.meta import META
from data_pipeline.packing import Sample
from data_pipeline.remote import is_remote, list_names

EXCERPT_TOKENS = 64
SHOWN = 3  # samples


def inspect_dataset(folder: Path | str) -> dict[str, dict[str, Any]]:
    """By split: meta.json's fields, fill rate, lengths, shards, bytes, and some samples, decoded.

    `folder` is what `prepare` wrote (OUT) or one split of it, or its URL. Raises DataError.
    """
    return {dataset.name: _inspect(dataset) for dataset in _splits(str(folder))}


def _inspect(dataset: PackedDataset) -> dict[str, Any]:
    meta = dataset.meta
    numbers = sorted({len(dataset) * n // SHOWN for n in range(SHOWN)})
    samples = {f"sample_{n}": dataset[n] for n in numbers}
    found: dict[str, Any] = {
        **meta.model_dump(),
        "fill_rate": meta.tokens / (meta.tokens + meta.padding),
        "tokens_per_document": meta.tokens / meta.documents,
        "shards": len(dataset.shards),
        "bytes": sum(file.size for shard in dataset.shards for file in shard.files),
        "token_dtype": dataset.dtype.name,
        **{f"{name}_doc_lens": sample.doc_lens.tolist() for name, sample in samples.items()},
    }
    with contextlib.suppress(DataError):  # shards may be moved without it
        tokenizer = Tokenizer.from_str(dataset.tokenizer().decode())
        for name, sample in samples.items():
            excerpt = sample.tokens[:EXCERPT_TOKENS].tolist()
            found[f"{name}_text"] = tokenizer.decode(excerpt, skip_special_tokens=False)
    return found


def verify_dataset(folder: Path | str) -> None:
    """Check every shard's checksum, decode every sample and compare the counts with meta.json.

    `folder` is what `prepare` wrote (OUT) or one split of it, or its URL. Raises DataError at the
    first fault.
    """
    for dataset in _splits(str(folder)):
        padding, loss_tokens = token_counts(_samples(dataset))
        counted = {
            "padding": padding,
            "loss_tokens": loss_tokens,
            "tokens": len(dataset) * (dataset.meta.seq_len + 1) - padding,
        }
        for field, value in counted.items():
            if value != (said := getattr(dataset.meta, field)):
                raise DataError(
                    f"{dataset.folder}/meta.json: {field} is {said}, but the shards hold {value}; "
                    "the file was changed. Prepare the data again."
                )


def _samples(dataset: PackedDataset) -> Iterator[Sample]:
    """All of them, with token ids of the vocabulary."""
    for index in range(len(dataset)):
        sample = dataset[index]
        if (largest := int(sample.tokens.max())) >= dataset.meta.vocab_size:
            raise DataError(
                f"{dataset.folder}: sample {index} has the token {largest}, but the vocabulary has "
                f"{dataset.meta.vocab_size}; prepare the data again."
            )
        yield sample


def _splits(folder: str) -> list[PackedDataset]:
    """`folder` itself if it holds shards, else its subfolders that do."""
    if is_remote(folder):
        found = list_names(folder, attempts=2)
        return [PackedDataset(folder)] if META in found else _remote_splits(folder)
    path = Path(folder)
    if (path / INDEX).exists() or (path / META).exists():
        return [PackedDataset(path)]
    splits = sorted(file.parent for file in path.glob(f"*/{META}"))
    if not splits:
        raise DataError(f"{folder}: no prepared data there. Make it with `transxssm prepare`.")
    return [PackedDataset(split) for split in splits]


def _remote_splits(url: str) -> list[PackedDataset]:
    places = [f"{url.rstrip('/')}/{split}" for split in ("train", "validation")]
    return [PackedDataset(place) for place in places if META in list_names(place, attempts=2)]
