"""Hugging Face tokenizers: what decides the ids of a text, and what a file may add to them.

A tokenizer.json is rewritten by whoever saves it (a library of another version, an export that
leaves out a post-processor), so that its bytes say little. Two tokenizers are the same if they have
the same model, normalizer, pre-tokenizer and added tokens.
"""

import json
from typing import Any

from tokenizers import Tokenizer  # type: ignore[import-untyped]

DECIDING = ("model", "normalizer", "pre_tokenizer", "added_tokens")


def as_in_training(tokenizer: Tokenizer) -> Tokenizer:
    """Turn off what saved files switch on beyond the ids of a text; returns the same tokenizer.

    Truncation and padding, a model's dropout, and special tokens in a text, which stay text. Tokens
    that a post-processor adds are left out where text is encoded, by add_special_tokens=False.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the ids of a text, by its name in tokenizer.json, as this version of the library
    writes it. Equal for two tokenizers if they are the same."""
    described = json.loads(tokenizer.to_str())
    parts = {name: described.get(name) for name in DECIDING}
    parts["model"].pop("dropout", None)
    return parts


def differing_parts(one: Tokenizer, other: Tokenizer) -> list[str]:
    """Names of what differs between two tokenizers of what decides the ids of a text; none if they
    are the same."""
    mine, theirs = identity(one), identity(other)
    return [name for name in DECIDING if mine[name] != theirs[name]]
