"""A document alone and packed with others: the same through loader, model and loss."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ranks import run_ranks
from data_pipeline.collate import collate
from data_pipeline.dataset import PackedDataset
from data_pipeline.packing import Sample
from tests.conftest import SEQ_LEN
from tests.tiny import tiny_config

ROWS = 6


def token_losses(stage: Any, samples: list[Sample]) -> torch.Tensor:
    """Of every token of a batch, [B, L]."""
    batch = collate(samples)
    with torch.no_grad():
        _, losses, _ = stage(
            batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens
        )
    return losses.view(batch.tokens.shape)


def alone(sample: Sample, piece: slice) -> Sample:
    """One piece of a sample at the begin of a row, padding behind it."""
    length = sample.tokens.size
    tokens = np.zeros_like(sample.tokens)
    size = piece.stop - piece.start
    tokens[:size] = sample.tokens[piece]
    lens = [size, length - size] if size < length else [size]
    return Sample(tokens, np.array(lens, np.int32), length - size)


def pieces(sample: Sample) -> list[slice]:
    """Where the documents of a sample are."""
    ends = np.cumsum(sample.doc_lens).tolist()
    lens = sample.doc_lens.tolist()
    found = [slice(end - size, end) for end, size in zip(ends, lens, strict=True)]
    return found[:-1] if sample.num_pad else found


def compare(data: Path, folder: Path) -> tuple[int, float, int]:
    """Documents; the largest difference to each alone; losses of others that one document's text
    changed."""
    from parallel.compat import prepare_host
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from pretrain.stage import configured_stage

    config = tiny_config(data, folder)
    device = prepare_host()
    init_distributed(launch_from_environment(), device)
    init_groups(config.parallel)
    (stage,) = configured_stage(config, device).chunks
    dataset = PackedDataset(data / "train", seq_len=SEQ_LEN)
    several = [i for i in range(len(dataset)) if len(pieces(dataset[i])) > 1][:ROWS]
    samples = dataset.read(np.array(several))
    together = token_losses(stage, samples)
    documents, worst, changed = 0, 0.0, 0
    for row, sample in enumerate(samples):
        for piece in pieces(sample):
            size = piece.stop - piece.start - 1  # its last token has no label of its own
            single = token_losses(stage, [alone(sample, piece)])[0, :size]
            packed = together[row, piece.start : piece.start + size]
            worst = max(worst, float((single - packed).abs().max()) if size else 0.0)
            documents += 1
        first = pieces(sample)[0]
        other = sample.tokens.copy()
        other[first] = (other[first] + 7) % config.model.vocab_size
        altered = [*samples[:row], Sample(other, sample.doc_lens, sample.num_pad)]
        found = token_losses(stage, altered + samples[row + 1 :])
        same = found == together
        same[row, : first.stop] = True
        changed += int((~same).sum())
        assert not torch.equal(found[row, : first.stop], together[row, : first.stop])
    return documents, worst, changed


def test_packing_changes_no_document(tiny_data: Path, tmp_path: Path) -> None:
    documents, worst, changed = run_ranks(1, compare, tiny_data, tmp_path)[0]
    assert documents > ROWS
    assert worst < 1e-5
    assert changed == 0
