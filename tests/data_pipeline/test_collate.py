"""Batches against a definition written token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.collate import collate
from data_pipeline.packing import Sample


@st.composite
def rows(draw) -> list[Sample]:
    length = draw(st.integers(2, 24))
    samples = []
    for _ in range(draw(st.integers(1, 4))):
        cuts = draw(st.sets(st.integers(1, length - 1)))
        doc_lens = np.diff([0, *sorted(cuts), length]).astype(np.int32)
        num_pad = int(doc_lens[-1]) if len(doc_lens) > 1 and draw(st.booleans()) else 0
        tokens = np.arange(length, dtype=np.uint16) + draw(st.integers(0, 60000))
        samples.append(Sample(tokens.astype(np.uint16), doc_lens, num_pad))
    return samples


@settings(deadline=None, max_examples=200)
@given(rows())
def test_batch_equals_its_definition(samples):
    check(samples)


@pytest.mark.parametrize("cuts", [(), (1,), (1023,), (600, 601)], ids=str)
def test_long_pieces_equal_the_definition(cuts):
    """Fewer pieces than one in 256 tokens: their positions are made another way."""
    doc_lens = np.diff([0, *cuts, 1024]).astype(np.int32)
    samples = [
        Sample(np.arange(1024, dtype=np.uint16) + np.uint16(row), doc_lens, num_pad)
        for row, num_pad in enumerate((0, int(doc_lens[-1]) if cuts else 0))
    ]
    check(samples)


def check(samples):
    batch = collate(samples)
    length = samples[0].tokens.size - 1
    borders = []
    for b, sample in enumerate(samples):
        owner = [n for n, size in enumerate(sample.doc_lens) for _ in range(size)]
        padding = len(sample.doc_lens) - 1 if sample.num_pad else None
        for i in range(length):
            starts_here = i == 0 or owner[i] != owner[i - 1]
            if starts_here:
                borders.append(b * length + i)
            position = i - owner.index(owner[i])
            counts = owner[i] == owner[i + 1] != padding
            assert batch.tokens[b, i] == sample.tokens[i]
            assert batch.labels[b, i] == sample.tokens[i + 1]
            assert batch.position_ids[b, i] == position
            assert batch.loss_mask[b, i] == float(counts)
    assert batch.cu_seqlens.tolist() == [*borders, len(samples) * length]
    assert batch.cu_seqlens.diff().min() > 0
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.position_ids.dtype == batch.cu_seqlens.dtype == torch.int32
    assert batch.loss_mask.dtype == torch.float32
    assert all(tensor.stride(-1) == 1 for tensor in vars(batch).values())
    assert batch.sources.tolist() == [0] * len(samples)


def test_filling_rows_have_no_loss():
    sample = Sample(np.arange(9, dtype=np.uint16), np.array([9], np.int32), 0)
    batch = collate([sample, sample, sample], num_counted=1)
    assert batch.loss_mask.sum(dim=1).tolist() == [8, 0, 0]
