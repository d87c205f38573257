"""How well text is predicted: loss, perplexity, bits per byte, share of likeliest tokens."""

import json
import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer  # type: ignore[import-untyped]
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Sums over tokens."""

    nats: float
    tokens: int
    missed: int
    """Tokens that another one was likelier than."""
    bytes: int
    """Of text that the tokens stand for."""

    @classmethod
    def of(cls, table: Tensor) -> "Scores":
        """From a table of `parallel.sums` [4, size], summed over its keys; or one column [4]."""
        nats, *counts = table.reshape(4, -1).sum(1).tolist()
        return cls(nats, *(round(count) for count in counts))

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Of text, whatever the tokenizer."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def accuracy(self) -> float:
        """Share of tokens that no other was likelier than."""
        return 1 - self.missed / self.tokens if self.tokens else math.nan


def perplexity(loss: float) -> float:
    """exp(loss); inf rather than an overflow."""
    return math.exp(loss) if not loss > 700 else math.inf


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Bytes of text that every token stands for: float64 [vocab_size], 0 for special ones.

    Read from the vocabulary, since what decoding shows of a part of a character is not that part.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    spec = json.loads(tokenizer.to_str())
    kinds = set(_types(spec.get("decoder")))
    sizes = torch.zeros(vocab_size, dtype=torch.float64)
    for token, number in vocabulary.items():
        if number >= vocab_size:
            continue
        if "ByteLevel" in kinds:  # a character stands for a byte
            sizes[number] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            sizes[number] = 1
        else:
            sizes[number] = len(token.replace("▁", " ").encode())
    for number, added in tokenizer.get_added_tokens_decoder().items():
        if number < vocab_size:
            sizes[number] = 0 if added.special else len(added.content.encode())
    return sizes


def _types(decoder: dict[str, object] | None) -> list[str]:
    if decoder is None:
        return []
    inner = decoder.get("decoders", [])
    assert isinstance(inner, list)
    return [str(decoder["type"]), *(str(part["type"]) for part in inner)]


def position_bins(length: int) -> list[tuple[int, int]]:
    """[begin, end) of positions in the context, each about as wide as all before it."""
    ends = [16]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    begins = [0, *ends[:-1]]
    return [(begin, min(end, length)) for begin, end in zip(begins, ends, strict=True)]


def by_bins(table: Tensor) -> dict[tuple[int, int], Scores]:
    """Of a table by position; bins without tokens are left out."""
    found = {(a, b): Scores.of(table[:, a:b]) for a, b in position_bins(table.shape[1])}
    return {bin_: scores for bin_, scores in found.items() if scores.tokens}
