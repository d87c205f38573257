"""Looking into prepared data: what `transxssm data inspect` and `data verify` do."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import PackedDataset, refuse_without_loss
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.meta import META
from data_pipeline.packing import Sample
from data_pipeline.remote import is_remote, list_paths
from data_pipeline.storage import Cache
from data_pipeline.tokenizer import parse_tokenizer, vocab_size_of

EXCERPT_TOKENS = 64
SHOWN = 3  # samples
VERIFY_BYTES = 1 << 30  # of copies, while a URL is verified
ATTEMPTS = 2


def inspect_dataset(folder: Path | str) -> dict[str, dict[str, Any]]:
    """By split: meta.json's fields, fill rate, lengths, shards, bytes, and some samples, decoded.

    `folder` is what `prepare` wrote (OUT) or one split of it, or its URL. Raises DataError, also
    where there is no prepared data.
    """
    datasets = [PackedDataset(split) for split in _splits(str(folder))]
    return {dataset.name: _inspect(dataset) for dataset in datasets}


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
    try:
        content = dataset.tokenizer()
    except DataError:  # shards may be moved without it
        return found
    tokenizer = parse_tokenizer(content, dataset.tokenizer_name)
    for name, sample in samples.items():
        excerpt = sample.tokens[:EXCERPT_TOKENS].tolist()
        found[f"{name}_text"] = tokenizer.decode(excerpt, skip_special_tokens=False)
    return found


# -- verifying -----------------------------------------------------------------------------------


def verify_dataset(folder: Path | str) -> None:
    """Check every shard's checksum, decode every sample, and compare tokenizer.json and the counts
    with meta.json. Nothing that was found sound before, or is in the node's cache, is trusted.

    `folder` is what `prepare` wrote (OUT) or one split of it, or its URL. Raises DataError at the
    first fault, also where there is no prepared data.
    """
    with tempfile.TemporaryDirectory(prefix="transxssm-verify.") as private:
        cache = Cache(Path(private), VERIFY_BYTES, attempts=ATTEMPTS)
        for split in _splits(str(folder)):
            _verify(PackedDataset(split, cache=cache))


def _verify(dataset: PackedDataset) -> None:
    meta = dataset.meta
    refuse_without_loss(dataset)
    tokenizer = parse_tokenizer(dataset.tokenizer(), dataset.tokenizer_name)
    counted = _counts(dataset) | {"vocab_size": vocab_size_of(tokenizer)}
    for field, value in counted.items():
        said = getattr(meta, field)
        if not np.isclose(value, said, rtol=1e-9, atol=0):
            raise DataError(
                f"{dataset.folder}/{META}: {field} is {said}, but the shards and the tokenizer say "
                f"{value}; the file was changed. Prepare the data again."
            )


def _counts(dataset: PackedDataset) -> dict[str, float]:
    """What meta.json says of the samples, counted. Of cut documents only bounds can be."""
    meta = dataset.meta
    labels: NDArray[np.int64] = np.zeros(meta.vocab_size, np.int64)
    padding = documents = unfinished = 0
    for sample in _samples(dataset):
        padding += sample.num_pad
        ends = np.cumsum(sample.doc_lens)
        last = sample.tokens[ends[: ends.size - (sample.num_pad > 0)] - 1]
        documents += int((last == meta.eod_id).sum())
        unfinished += int((last != meta.eod_id).sum())
        labels += label_counts(sample, meta.vocab_size)
    loss_tokens = int(labels.sum())
    p = labels[labels > 0] / max(1, loss_tokens)
    fewest, most = min(1, unfinished), min(unfinished, documents)
    return {
        "documents": documents,
        "cut_documents": min(max(meta.cut_documents, fewest), most),
        "tokens": len(dataset) * (meta.seq_len + 1) - padding,
        "padding": padding,
        "loss_tokens": loss_tokens,
        "unigram_entropy": float(-(p * np.log(p)).sum()),
    }


def label_counts(sample: Sample, vocab_size: int) -> NDArray[np.int64]:
    """How often each token is a label that counts, int64 [vocab_size]."""
    is_label = np.ones(sample.tokens.size, bool)
    is_label[np.cumsum(sample.doc_lens) - sample.doc_lens] = False  # the first of a piece
    is_label[sample.tokens.size - sample.num_pad :] = False
    counts: NDArray[np.int64] = np.bincount(sample.tokens[is_label], minlength=vocab_size)
    return counts


def _samples(dataset: PackedDataset) -> Iterator[Sample]:
    """All of them, with token ids of the vocabulary, and padding that is padding."""
    begin = 0
    for shard in dataset.shards:
        for index in range(begin, begin + shard.samples):
            sample = dataset[index]
            if (largest := int(sample.tokens.max())) >= dataset.meta.vocab_size:
                raise DataError(
                    f"{dataset.folder}: sample {index} has the token {largest}, but the vocabulary "
                    f"has {dataset.meta.vocab_size}; prepare the data again."
                )
            padding = sample.tokens[sample.tokens.size - sample.num_pad :]
            if (padding != dataset.meta.pad_id).any():
                raise DataError(
                    f"{dataset.folder}: sample {index} is padded with the token {int(padding[0])}, "
                    f"but pad_id in {META} is {dataset.meta.pad_id}; prepare the data again."
                )
            yield sample
        dataset.close()  # an open copy takes room, even if it is removed
        begin += shard.samples


# -- which folders -------------------------------------------------------------------------------


def _splits(folder: str) -> list[str]:
    """`folder` itself if it holds shards, else its subfolders that do, or seem to: what has no
    meta.json is refused when it is opened. Raises DataError if there is none."""
    found = list_paths(folder if is_remote(folder) else f"file://{folder}", attempts=ATTEMPTS)
    parts = [path.rpartition("/") for path in found]
    holders = {parent for parent, _, name in parts if _is_of_a_split(name)}
    splits = [folder] if "" in holders else sorted(holders)
    if not splits:
        raise DataError(f"{folder}: no prepared data there. Make it with `transxssm prepare`.")
    return splits if "" in holders else [f"{folder.rstrip('/')}/{split}" for split in splits]


def _is_of_a_split(name: str) -> bool:
    return name in (META, INDEX) or name.startswith("shard.")
