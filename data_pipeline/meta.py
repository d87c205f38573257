"""meta.json: what a folder of shards holds and how it was made."""

import hashlib
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.packing import Packing

META = "meta.json"
FORMAT_VERSION = 2
Format = Literal["mds", "webdataset"]


class DatasetMeta(BaseModel):
    """Everything a reader checks before the first sample, and a person wants to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    format: Format
    seq_len: int
    """Input tokens a sample; it holds one more."""
    packing: Packing
    seed: int
    """Of the split into training and validation documents."""
    tokenizer_hash: str
    """SHA-256 of tokenizer.json."""
    vocab_size: int
    eod_id: int
    pad_id: int
    samples: int
    documents: int
    cut_documents: int
    """Documents that lie in more than one sample."""
    tokens: int
    """Tokens without padding, end-of-text included."""
    padding: int
    loss_tokens: int
    """Labels that count: neither padding nor the first token of a piece."""
    unigram_entropy: float
    """Nats a token, of those labels: the loss of the best model that ignores its input."""
    fingerprint: str
    """SHA-256 over index.json, hence over every shard's hash, and the tokenizer's hash."""


def fingerprint(index: bytes, tokenizer_hash: str) -> str:
    """The identity of a dataset: equal if and only if its samples are."""
    return hashlib.sha256(index + tokenizer_hash.encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Of tokens in shards: the smaller of 16 and 32 bits that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def parse_meta(content: bytes, file: str) -> DatasetMeta:
    """meta.json's content. Raises DataError, naming `file`, when it is damaged or of another
    version."""
    try:
        meta = DatasetMeta.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{file}: {field}: {first['msg']}. The file is damaged or was written by another "
            "version; run `transxssm prepare` again."
        ) from error
    if meta.format_version != FORMAT_VERSION:
        raise DataError(
            f"{file}: format version {meta.format_version}, this program reads {FORMAT_VERSION}; "
            "run `transxssm prepare` again."
        )
    return meta
