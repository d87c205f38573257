from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import packing as packing_module
from data_pipeline.packing import Packer, Sample, make_packer

EOD, PAD = 0, 1
DOCUMENTS = st.lists(st.lists(st.integers(2, 99), max_size=40), min_size=1, max_size=30)


def pack(packer: Packer, docs: list[list[int]]) -> list[Sample]:
    return [sample for doc in docs for sample in packer.add(doc)] + packer.finish()


def pieces(sample: Sample) -> list[list[int]]:
    """The sample's segments without padding."""
    parts = np.split(sample.tokens, np.cumsum(sample.doc_lens)[:-1])
    return [part.tolist() for part in (parts[:-1] if sample.num_pad else parts)]


@settings(deadline=None)
@given(docs=DOCUMENTS, seq_len=st.integers(1, 20), small_buffer=st.booleans())
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_no_token_is_lost_or_doubled(packing, docs, seq_len, small_buffer):
    packer = make_packer(packing, seq_len, EOD, PAD)
    if small_buffer and packing == "best_fit":
        packer._capacity = 16
    samples = pack(packer, docs)
    for sample in samples:
        assert sample.tokens.size == seq_len + 1 == sample.doc_lens.sum()
        assert sample.doc_lens.min() > 0
        if sample.num_pad:
            assert sample.doc_lens[-1] == sample.num_pad
            assert (sample.tokens[-sample.num_pad :] == PAD).all()
    packed = Counter(token for s in samples for piece in pieces(s) for token in piece)
    assert packed == Counter(token for doc in docs for token in [*doc, EOD])
    counts = packer.counts
    assert counts.documents == len(docs)
    assert counts.samples == len(samples)
    assert counts.padding == sum(s.num_pad for s in samples)
    assert counts.tokens + counts.padding == len(samples) * (seq_len + 1)


@settings(deadline=None)
@given(docs=DOCUMENTS, seq_len=st.integers(1, 20), part=st.integers(1, 25))
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_parts_of_a_document_are_packed_as_the_whole(packing, docs, seq_len, part):
    whole, parted = (make_packer(packing, seq_len, EOD, PAD) for _ in range(2))
    expected, found = pack(whole, docs), []
    for doc in docs:
        for at in range(0, len(doc) + 1, part):
            found += parted.add(doc[at : at + part], ends=at + part > len(doc))
    found += parted.finish()
    assert [pieces(sample) for sample in found] == [pieces(sample) for sample in expected]
    assert parted.counts == whole.counts


@settings(deadline=None)
@given(docs=DOCUMENTS, seq_len=st.integers(1, 20))
def test_best_fit_cuts_only_documents_longer_than_a_sequence(docs, seq_len):
    packer = make_packer("best_fit", seq_len, EOD, PAD)
    whole = Counter(tuple(piece) for s in pack(packer, docs) for piece in pieces(s))
    fitting = Counter((*doc, EOD) for doc in docs if len(doc) < seq_len + 1)
    assert fitting <= whole
    assert packer.counts.cut_documents == len(docs) - fitting.total()


@settings(deadline=None)
@given(docs=DOCUMENTS, seq_len=st.integers(1, 20))
def test_concat_keeps_the_order_and_pads_only_the_last(docs, seq_len):
    packer = make_packer("concat", seq_len, EOD, PAD)
    samples = pack(packer, docs)
    stream = [token for s in samples for piece in pieces(s) for token in piece]
    assert stream == [token for doc in docs for token in [*doc, EOD]]
    assert all(s.num_pad == 0 for s in samples[:-1])
    # A document is cut when its first and last token lie in different samples.
    ends = np.cumsum([len(doc) + 1 for doc in docs])
    starts = ends - [len(doc) + 1 for doc in docs]
    crossing = starts // (seq_len + 1) != (ends - 1) // (seq_len + 1)
    assert packer.counts.cut_documents == crossing.sum()


def test_best_fit_fills_well():
    rng = np.random.default_rng(0)
    packer = make_packer("best_fit", 128, EOD, PAD)
    pack(packer, [[5] * int(n) for n in rng.geometric(1 / 80, 3000)])
    assert packer.counts.fill_rate > 0.99


def test_best_fit_buffer_is_bounded(monkeypatch):
    monkeypatch.setattr(packing_module, "BUFFER_TOKENS", 1000)
    packer = make_packer("best_fit", 9, EOD, PAD)
    given_out = sum(len(packer.add([7] * 5)) for _ in range(1000))
    assert given_out > 800  # one document of 6 a sample; at most 1,000 tokens held back


def test_best_fit_leaves_the_least_room():
    """What fits exactly goes there, not where there is more room."""
    packer = make_packer("best_fit", 9, EOD, PAD)
    samples = pack(packer, [[2] * 4, [3] * 2, [4] * 6])  # pieces of 5, 3 and 7 tokens
    assert [sample.doc_lens.tolist() for sample in samples] == [[7, 3], [5, 5]]
