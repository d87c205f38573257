"""What a model finds again in its context: a needle in a haystack, and pairs it was shown.

Needle: a haystack of text, into which a sentence with a number is put at some depth; after it the
same sentence again, up to the number. Recall (multi-query associative recall; Arora et al.,
Zoology, arXiv 2312.04927): pairs of random tokens k₁ v₁ k₂ v₂ …, then keys again, whose values
count.

Scored is what the model gives the right answer, without sampling: the share of its tokens that are
the likeliest, and the nats a token that it is likelier than after the same text without the needle,
or after the same keys with other values. A model that finds nothing gains nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import ConfigError
from pretrain.evaluation.models import Model
from pretrain.evaluation.rows import Row, score_rows
from pretrain.evaluation.scores import Scores

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIRS = (4, 16, 64)
SHORTEST = 128  # context


@dataclass(frozen=True)
class Cell:
    """Of a heat map: where, and what was found there."""

    row: float
    column: int
    found: float
    """Share of the answers' tokens, 0 to 1."""
    gain: float
    """Nats a token that the answer is likelier for having been there."""


def lengths_to(longest: int, shortest: int = SHORTEST) -> list[int]:
    """Powers of two from `shortest` to `longest`, and that itself."""
    found = []
    while shortest < longest:
        found.append(shortest)
        shortest *= 2
    return [*found, longest]


def needle(model: Model, haystack: Sequence[int], *, cases: int, seed: int = 0) -> list[Cell]:
    """By depth (0: first) and context length in tokens. Raises ConfigError for a short haystack."""
    rng = random.Random(seed)
    places: list[tuple[float, int]] = []
    rows: list[tuple[Row, Row]] = []
    for length in lengths_to(model.max_length):
        for depth in DEPTHS:
            for _ in range(cases):
                places.append((depth, length))
                rows.append(_needle_rows(model, haystack, depth, length, rng))
    return _cells(model, places, rows)


def _needle_rows(
    model: Model, haystack: Sequence[int], depth: float, length: int, rng: random.Random
) -> tuple[Row, Row]:
    """With the needle and without."""

    def ids(text: str) -> list[int]:
        return list(model.tokenizer.encode(text, add_special_tokens=False).ids)

    number = " ".join(str(rng.randrange(10)) for _ in range(5))
    begin, answer, end = ids("\nThe secret number is"), ids(f" {number}"), ids(".\n")
    hidden = [*begin, *answer, *end]
    room = length - len(hidden) - len(begin) - len(answer)
    if room < 1 or len(haystack) < length:
        raise ConfigError(
            f"a needle in {length} tokens wants more room, or more text than these "
            f"{len(haystack):,} tokens to be hidden in; give more text, or another --max-length"
        )
    at = rng.randrange(len(haystack) - length + 1)
    hay = list(haystack[at : at + length])
    before = round(depth * room)
    there = [*hay[:before], *hidden, *hay[before:room]]
    found = []
    for context in (there, hay[: len(there)]):
        whole = [model.end_of_text, *context, *begin, *answer]
        found.append(Row(whole, range(len(whole) - len(answer), len(whole))))
    return found[0], found[1]


def recall(model: Model, *, cases: int, seed: int = 0) -> list[Cell]:
    """By number of pairs and context length: pairs, other tokens, then all pairs in another
    order."""
    rng = random.Random(seed)
    added = model.tokenizer.get_added_tokens_decoder()
    known = range(min(model.vocab_size, model.tokenizer.get_vocab_size()))
    usable = [i for i in known if i not in added]
    places: list[tuple[float, int]] = []
    rows: list[tuple[Row, Row]] = []
    for length in lengths_to(model.max_length):
        for pairs in PAIRS:
            if 4 * pairs <= length and 3 * pairs <= len(usable) // 2:
                for _ in range(cases):
                    places.append((pairs, length))
                    rows.append(_recall_rows(model.end_of_text, usable, pairs, length, rng))
    return _cells(model, places, rows)


def _recall_rows(
    end_of_text: int, usable: list[int], pairs: int, length: int, rng: random.Random
) -> tuple[Row, Row]:
    """With the values that are asked for and with others."""
    drawn = rng.sample(usable, 3 * pairs)
    keys, values, others = drawn[:pairs], drawn[pairs : 2 * pairs], drawn[2 * pairs :]
    filler = rng.choices(sorted(set(usable) - set(drawn)), k=length - 4 * pairs)
    asked = [token for i in rng.sample(range(pairs), pairs) for token in (keys[i], values[i])]
    found = []
    for shown in (values, others):
        pairs_shown = [token for pair in zip(keys, shown, strict=True) for token in pair]
        whole = [end_of_text, *pairs_shown, *filler, *asked]
        found.append(Row(whole, range(len(whole) - len(asked) + 1, len(whole), 2)))
    return found[0], found[1]


def _cells(
    model: Model, places: list[tuple[float, int]], rows: list[tuple[Row, Row]]
) -> list[Cell]:
    """Means over the cases of each place."""
    scores = score_rows(model, [row for pair in rows for row in pair])
    found: dict[tuple[float, int], list[tuple[Scores, Scores]]] = {}
    for place, there, without in zip(places, scores[::2], scores[1::2], strict=True):
        found.setdefault(place, []).append((there, without))
    return [
        Cell(
            row,
            column,
            sum(there.accuracy for there, _ in cases) / len(cases),
            sum(without.loss - there.loss for there, without in cases) / len(cases),
        )
        for (row, column), cases in found.items()
    ]
