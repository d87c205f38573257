"""How much of a text a tokenizer keeps: encoded, decoded again and compared.

    lost = Σ_c max(0, count of c in the text − count of c in what comes back) / characters

over characters that are not white space, in NFKC and case-folded, so that a normalizer that only
writes a character differently loses none. Tokens of unknown text stand for none.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from unicodedata import normalize

from tokenizers import Tokenizer, models  # type: ignore[import-untyped]

from data_pipeline.compressed import is_compressed
from data_pipeline.corpus import LINE_SUFFIXES, Piece, kind
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import TextTokenizer
from data_pipeline.unit import Options

MAX_LOST = 0.001  # of the characters, unless a larger share is allowed
SAMPLE_CHARACTERS, PLACES = 1 << 20, 64
EXCERPT = 40  # characters


@dataclass(frozen=True)
class RoundTrip:
    """What came back of a sample."""

    texts: int
    characters: int
    lost: int
    text: str = ""
    """The first characters of a text that did not come back."""
    came_back: str = ""

    @property
    def share(self) -> float:
        """Share of the characters that are lost."""
        return self.lost / max(1, self.characters)

    def __str__(self) -> str:
        return (
            f"{self.share:.2%} of {self.characters:,} characters are lost by encoding and decoding "
            f"them (a sample of {self.texts:,} {'text' if self.texts == 1 else 'texts'})"
        )


def round_trip(tokenizer: TextTokenizer, texts: Iterable[str]) -> RoundTrip:
    """Encode and decode texts, and compare."""
    found = RoundTrip(0, 0, 0)
    unknown = unknown_id(tokenizer.tokenizer)
    worst = 0.0
    for text in texts:
        (ids,) = tokenizer.encode_batch([text])
        back = tokenizer.decode([number for number in ids if number != unknown])
        had, has = _characters(text), _characters(back)
        lost, characters = (had - has).total(), had.total()
        found = replace(
            found,
            texts=found.texts + 1,
            characters=found.characters + characters,
            lost=found.lost + lost,
        )
        if lost > worst * max(1, characters):
            worst = lost / characters
            begin = _first_lost(text, had - has)
            found = replace(found, text=text[begin : begin + EXCERPT])
            (ids,) = tokenizer.encode_batch([found.text])
            kept = [number for number in ids if number != unknown]
            found = replace(found, came_back=tokenizer.decode(kept)[:EXCERPT])
    return found


def _characters(text: str) -> Counter[str]:
    return Counter("".join(normalize("NFKC", text).casefold().split()))


def _first_lost(text: str, lost: Counter[str]) -> int:
    """Where the first character that is among the lost ones stands, or 0."""
    for at, character in enumerate(text):
        if not lost.keys().isdisjoint(_characters(character)):
            return at
    return 0


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The token that stands for what the vocabulary does not have, if there is one."""
    if isinstance(tokenizer.model, models.Unigram):  # has no attribute for it
        number: int | None = json.loads(tokenizer.to_str())["model"].get("unk_id")
        return number
    name = tokenizer.model.unk_token
    return None if name is None else tokenizer.token_to_id(name)


def check_round_trip(
    plan: Mapping[str, Sequence[Piece]],
    tokenizer: TextTokenizer,
    options: Options,
    max_lost: float,
) -> RoundTrip:
    """Take a sample of the corpus through the tokenizer. Raises DataError if more than the share
    `max_lost` of its characters is lost."""
    pieces = [piece for unit in plan.values() for piece in unit]
    found = round_trip(tokenizer, sample(pieces, options))
    if found.share > max_lost:
        raise DataError(
            f"{tokenizer.file}: {found}, more than the {max_lost:.2%} that may be lost; "
            f"{found.text!r} comes back as {found.came_back!r}. Use a tokenizer that has all "
            "characters, such as a byte-level one (`transxssm tokenizer train`), or accept the "
            "loss with --max-lost-characters."
        )
    return found


def sample(pieces: Sequence[Piece], options: Options) -> Iterator[str]:
    """Texts from PLACES places all over the corpus, SAMPLE_CHARACTERS together: all texts of a
    small one. Places that cannot be read are left to the work itself, which names them and keeps
    what is done before."""
    total = sum(piece.num_bytes for piece in pieces)
    is_small = total <= SAMPLE_CHARACTERS
    places = list(pieces if is_small else _places(pieces, total))  # of a small one, each text once
    for place in places:
        is_whole = is_small and not is_compressed(place.path)
        room = SAMPLE_CHARACTERS if is_whole else SAMPLE_CHARACTERS // len(places)
        with suppress(DataError):
            for document in options.documents([place]):
                yield document.text[:room]
                room -= len(document.text)
                if room <= 0:
                    break


def _places(pieces: Sequence[Piece], total: int) -> Iterator[Piece]:
    """Pieces, or what of them begins there, at even distances."""
    before, number = 0, 0
    for piece in pieces:
        last: Piece | None = None
        while number < PLACES and total * number < PLACES * (before + piece.num_bytes):
            share = (total * number / PLACES - before) / max(1, piece.num_bytes)
            place = _from(piece, max(0.0, share))
            if place != last:
                yield place
            last, number = place, number + 1
        before += piece.num_bytes


def _from(piece: Piece, share: float) -> Piece:
    """The part of a piece after a share of it, where its kind can be read from there."""
    if is_compressed(piece.path) or kind(piece.path) not in LINE_SUFFIXES | {".parquet"}:
        return piece
    return replace(piece, start=piece.start + int(share * (piece.end - piece.start)))
