"""Looking into prepared data: what `transxssm data inspect` and `data verify` do."""

from pathlib import Path
from typing import Any

from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.tokenizer import load_tokenizer

EXCERPT_TOKENS = 64


def inspect_dataset(folder: Path) -> dict[str, dict[str, Any]]:
    """By split: meta.json's fields, fill rate, shards, bytes, and the first sample, decoded.

    `folder` is what `prepare` wrote (OUT) or one split of it. Raises DataError.
    """
    return {split.name: _inspect(split) for split in _splits(folder)}


def _inspect(folder: Path) -> dict[str, Any]:
    dataset = PackedDataset(folder)
    meta, first = dataset.meta, dataset[0]
    found: dict[str, Any] = {
        **meta.model_dump(),
        "fill_rate": meta.tokens / (meta.tokens + meta.padding),
        "shards": dataset.num_shards,
        "bytes": sum(file.stat().st_size for file in folder.glob("shard.*")),
        "token_dtype": first.tokens.dtype.name,
        "first_sample_doc_lens": first.doc_lens.tolist(),
    }
    if (folder.parent / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder.parent)
        if tokenizer.hash == meta.tokenizer_hash:
            found["first_sample_text"] = tokenizer.decode(first.tokens[:EXCERPT_TOKENS].tolist())
    return found


def verify_dataset(folder: Path) -> None:
    """Check every shard's checksum, decode every sample and compare the counts with meta.json.

    `folder` is what `prepare` wrote (OUT) or one split of it. Raises DataError at the first fault.
    """
    for split in _splits(folder):
        dataset = PackedDataset(split)
        padding = loss_tokens = 0
        for index in range(len(dataset)):
            sample = dataset[index]
            padding += sample.num_pad
            pieces = sample.doc_lens.size - (sample.num_pad > 0)
            loss_tokens += sample.tokens.size - sample.num_pad - int(pieces)
        counted = {
            "padding": padding,
            "loss_tokens": loss_tokens,
            "tokens": len(dataset) * (dataset.meta.seq_len + 1) - padding,
        }
        for field, value in counted.items():
            if value != getattr(dataset.meta, field):
                raise DataError(
                    f"{split / 'meta.json'}: {field} is {getattr(dataset.meta, field)}, but the "
                    f"shards hold {value}; the file was changed. Prepare the data again."
                )


def _splits(folder: Path) -> list[Path]:
    """`folder` itself if it holds shards, else its subfolders that do."""
    if (folder / INDEX).exists() or (folder / "meta.json").exists():
        return [folder]
    splits = sorted(file.parent for file in folder.glob("*/meta.json"))
    if not splits:
        raise DataError(f"{folder}: no prepared data there. Make it with `transxssm prepare`.")
    return splits
