"""What is found out of a corpus before it is tokenised, rather than after hours."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_pipeline.compressed import is_compressed
from data_pipeline.corpus import ROW_SUFFIXES, Piece, kind
from data_pipeline.errors import DataError
from data_pipeline.merge import empty_splits
from data_pipeline.reading import check_first_rows
from data_pipeline.round_trip import check_round_trip
from data_pipeline.tokenizer import TextTokenizer
from data_pipeline.unit import Options

LARGE_TEXT = 16 << 20  # bytes; few documents have as many


def check_corpus(
    plan: Mapping[str, Sequence[Piece]],
    tokenizer: TextTokenizer,
    options: Options,
    max_lost: float,
    tell: Callable[[str], None],
) -> None:
    """Find out what would fail only after hours, and tell what the corpus is. Raises DataError."""
    pieces = [piece for unit in plan.values() for piece in unit]
    check_first_rows(pieces, options.text_field)
    files = Counter(_suffix(path) for path in {piece.path for piece in pieces})
    tell("reading " + ", ".join(f"{count:,} {suffix}" for suffix, count in files.most_common()))
    if large := [piece for piece in pieces if _is_large_text(piece, options)]:
        tell(
            f"{large[0].path} is one document of {large[0].num_bytes:,} bytes (such files: "
            f"{len(large):,}); if it holds several, cut it with --document-separator"
        )
    sampled = check_round_trip(plan, tokenizer, options, max_lost)
    if sampled.texts:  # else the work itself says why nothing can be read
        tell(str(sampled))
    _check_splits(pieces, options)


def _is_large_text(piece: Piece, options: Options) -> bool:
    is_text = kind(piece.path) not in ROW_SUFFIXES and not options.document_separator
    return is_text and piece.num_bytes > LARGE_TEXT


def _suffix(path: Path) -> str:
    return f"{kind(path) or 'files without suffix'}{path.suffix if is_compressed(path) else ''}"


def _check_splits(pieces: Sequence[Piece], options: Options) -> None:
    """Raise EmptySplitError if a split gets no document: read until each has one."""
    empty = set(options.splits)
    for piece in pieces:
        one = kind(piece.path) not in ROW_SUFFIXES and not options.document_separator
        try:
            for document in options.documents([piece]):
                empty.discard(options.split_of(document))
                if not empty:
                    return
                if one:  # the rest of a file need not be read
                    break
        except DataError:  # left to the work itself, which keeps what is done before
            return
    raise empty_splits([split for split in options.splits if split in empty], options.splits)
