"""Documents into sequences of seq_len + 1 tokens.

Every document ends with the end-of-text token; a long one may come in parts. `best_fit` keeps
documents whole: only one longer than a sequence is cut, into full sequences and a remainder; all
pieces of a bounded buffer are then placed by best-fit decreasing, and what room stays is padded.
`concat` puts documents one after another and cuts at every sequence end; only the last sequence is
padded. Either way tokens are neither lost nor doubled.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Packing = Literal["best_fit", "concat"]
BUFFER_TOKENS = 1 << 22  # best_fit's buffer: 16 MiB of int32, however large the corpus
MIN_BUFFER_SEQUENCES = 64


class Sample(NamedTuple):
    """One packed sequence; a tuple, since thousands a second are made.

    tokens:   integers [seq_len + 1]
    doc_lens: int32 [num_segments], all > 0, sum seq_len + 1; the last one is padding if num_pad > 0
    num_pad:  padding tokens at the end; all of them in place of a sample that cannot be read
    """

    tokens: NDArray[np.integer]
    doc_lens: NDArray[np.int32]
    num_pad: int


@dataclass
class PackingCounts:
    """What a packer has seen and given out. `tokens` are those of samples, without padding."""

    documents: int = 0
    cut_documents: int = 0
    samples: int = 0
    tokens: int = 0
    padding: int = 0

    @property
    def fill_rate(self) -> float:
        """Share of positions that hold text."""
        return self.tokens / max(1, self.tokens + self.padding)


class Packer(ABC):
    """Takes documents one by one and gives samples back as they are complete."""

    def __init__(self, seq_len: int, eod_id: int, pad_id: int) -> None:
        self.length = seq_len + 1
        self.eod_id = eod_id
        self.pad_id = pad_id
        self.counts = PackingCounts()
        self._sequence: list[NDArray[np.int32]] = []  # that is being filled, and its room
        self._room = self.length
        self._begun: NDArray[np.int32] = np.zeros(0, np.int32)  # of a document that goes on
        self._was_cut = False  # that document

    def add(self, ids: list[int], ends: bool = True) -> list[Sample]:
        """Take a document's token ids (without end-of-text); returns the samples now complete.

        ends: whether the document ends with them; else the next ids go on with it.
        """
        tokens = np.array([*ids, self.eod_id] if ends else ids, np.int32)
        if self._begun.size:
            tokens = np.concatenate([self._begun, tokens])
        self._was_cut |= tokens.size + (not ends) > self._room
        samples = []
        while tokens.size >= self._room:
            samples.append(self._sample([*self._sequence, tokens[: self._room]]))
            tokens = tokens[self._room :]
            self._sequence, self._room = [], self.length
        self._begun = tokens
        if ends:
            self.counts.documents += 1
            self.counts.cut_documents += self._was_cut
            self._begun, self._was_cut = tokens[:0], False
            if tokens.size:
                samples += self._place(tokens)
        return samples

    @abstractmethod
    def _place(self, rest: NDArray[np.int32]) -> list[Sample]:
        """Take the end of a document, shorter than the room in the sequence."""

    @abstractmethod
    def finish(self) -> list[Sample]:
        """The samples still held back, the last one padded. Nothing may be added afterwards."""

    def _sample(self, pieces: list[NDArray[np.int32]]) -> Sample:
        """Pieces of at most `length` tokens together, padded at the end."""
        doc_lens = [piece.size for piece in pieces]
        num_pad = self.length - sum(doc_lens)
        if num_pad:
            pieces = [*pieces, np.full(num_pad, self.pad_id, np.int32)]
            doc_lens.append(num_pad)
        self.counts.samples += 1
        self.counts.tokens += self.length - num_pad
        self.counts.padding += num_pad
        return Sample(np.concatenate(pieces), np.array(doc_lens, np.int32), num_pad)


class BestFitPacker(Packer):
    """Whole documents, best-fit decreasing within a buffer."""

    def __init__(self, seq_len: int, eod_id: int, pad_id: int) -> None:
        super().__init__(seq_len, eod_id, pad_id)
        self._pieces: list[NDArray[np.int32]] = []
        self._buffered = 0
        self._capacity = max(BUFFER_TOKENS, MIN_BUFFER_SEQUENCES * self.length)

    def _place(self, rest: NDArray[np.int32]) -> list[Sample]:
        self._pieces.append(rest)
        self._buffered += rest.size
        return self.finish() if self._buffered >= self._capacity else []

    def finish(self) -> list[Sample]:
        """Place each piece, longest first, where it leaves the least room; else open a bin."""
        bins: list[list[NDArray[np.int32]]] = []
        by_room: list[tuple[int, int]] = []  # (room, bin number), sorted; full bins leave it
        for piece in sorted(self._pieces, key=len, reverse=True):
            at = bisect_left(by_room, (piece.size, -1))
            if at < len(by_room):
                room, number = by_room.pop(at)
            else:
                room, number = self.length, len(bins)
                bins.append([])
            bins[number].append(piece)
            if room > piece.size:
                insort(by_room, (room - piece.size, number))
        self._pieces, self._buffered = [], 0
        return [self._sample(pieces) for pieces in bins]


class ConcatPacker(Packer):
    """Documents one after another, cut at every sequence end."""

    def _place(self, rest: NDArray[np.int32]) -> list[Sample]:
        self._sequence.append(rest)
        self._room -= rest.size
        return []

    def finish(self) -> list[Sample]:
        pieces, self._sequence, self._room = self._sequence, [], self.length
        return [self._sample(pieces)] if pieces else []


def make_packer(packing: Packing, seq_len: int, eod_id: int, pad_id: int) -> Packer:
    """The packer of that name."""
    kind = {"best_fit": BestFitPacker, "concat": ConcatPacker}[packing]
    return kind(seq_len, eod_id, pad_id)
