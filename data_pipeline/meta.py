"""meta.json: what a folder of shards holds and how it was made."""

import hashlib
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from data_pipeline.errors import DataError
from data_pipeline.packing import Packing
from parallel import bounds
from untrusted.errors import UntrustedError
from untrusted.records import Count, Finite, parse_json

META = "meta.json"
FORMAT_VERSION = 2
Format = Literal["mds", "webdataset"]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
TokenId = Annotated[int, Field(ge=0, lt=bounds.VOCABULARY)]


class DatasetMeta(BaseModel):
    """Everything a reader checks before the first sample, and a person wants to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    format: Format
    seq_len: Annotated[int, Field(ge=1, le=bounds.LENGTH)]
    """Input tokens a sample; it holds one more."""
    packing: Packing
    seed: int
    """Of the split into training and validation documents."""
    tokenizer_hash: str
    """SHA-256 of tokenizer.json."""
    vocab_size: Annotated[int, Field(ge=1, le=bounds.VOCABULARY)]
    eod_id: TokenId
    pad_id: TokenId
    samples: Positive
    documents: Count
    cut_documents: Count
    """Documents that lie in more than one sample."""
    tokens: Positive
    """Tokens without padding, end-of-text included."""
    padding: Count
    loss_tokens: Count
    """Labels that count: neither padding nor the first token of a piece."""
    unigram_entropy: Finite
    """Nats a token, of those labels: the loss of the best model that ignores its input."""
    empty_rows: Count = 0
    """Rows without text (null, missing or blank) that became no document; in meta.json of the first
    split, where there are any."""
    fingerprint: str
    """SHA-256 over index.json, hence over every shard's hash, and the tokenizer's hash."""


META_FILE = TypeAdapter(DatasetMeta)


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
        remedy = "run `transxssm prepare` again, should another version have written it"
        meta = parse_json(content, META_FILE, file, remedy)
    except UntrustedError as error:
        raise DataError(str(error)) from error
    if meta.format_version != FORMAT_VERSION:
        raise DataError(
            f"{file}: format version {meta.format_version}, this program reads {FORMAT_VERSION}; "
            "run `transxssm prepare` again."
        )
    if max(meta.eod_id, meta.pad_id) >= meta.vocab_size:
        raise DataError(
            f"{file}: eod_id={meta.eod_id} and pad_id={meta.pad_id} are not below vocab_size="
            f"{meta.vocab_size}; the file is damaged. Run `transxssm prepare` again."
        )
    return meta
