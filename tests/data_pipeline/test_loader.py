import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from data_pipeline.batch import Batch
from data_pipeline.blend import Blend
from data_pipeline.collate import collate
from data_pipeline.config import DataConfig
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.inspection import verify_dataset
from data_pipeline.loader import BatchLoader, BatchSize, sequential_batches
from tests.data_pipeline.conftest import SEQ_LEN

GLOBAL = 8


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> PackedDataset:
    return PackedDataset(prepared / "train", seq_len=SEQ_LEN, vocab_size=300)


def loader(
    dataset: PackedDataset,
    rank: int = 0,
    size: int = 1,
    micro: int = 2,
    consumed: int = 0,
    workers: int = 1,
) -> BatchLoader:
    return BatchLoader(
        Blend([dataset], seed=7),
        [BatchSize(0, GLOBAL, micro)],
        data_parallel_rank=rank,
        data_parallel_size=size,
        samples_consumed=consumed,
        num_workers=workers,
    )


def read(dataset: PackedDataset, steps: int, **kwargs: int) -> list[list[Batch]]:
    reading = loader(dataset, **kwargs)
    try:
        return [reading.next_step() for _ in range(steps)]
    finally:
        reading.close()


def tokens(step: list[Batch]) -> list[list[int]]:
    return [row for batch in step for row in batch.tokens.tolist()]


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_data_parallel_size_does_not_change_global_batches(dataset, size, micro):
    steps = 2 * len(dataset) // GLOBAL + 2  # into the third epoch
    alone = [tokens(step) for step in read(dataset, steps)]
    ranks = [read(dataset, steps, rank=r, size=size, micro=micro) for r in range(size)]
    together = [[row for rank in ranks for row in tokens(rank[s])] for s in range(steps)]
    assert together == alone
    assert all(batch.tokens.shape[0] == micro for batch in ranks[0][0])


def test_every_sample_is_read_once_an_epoch(dataset):
    n = len(dataset)
    assert n % GLOBAL  # so that epochs end inside a batch
    seen = [row for step in read(dataset, 3 * n // GLOBAL) for row in tokens(step)]
    expected = sorted(dataset[i].tokens[:-1].tolist() for i in range(n))
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == expected
    assert seen[:n] != seen[n : 2 * n]


@pytest.mark.parametrize("consumed", [0, 1, 13, GLOBAL, 5 * GLOBAL])
def test_resuming_equals_continuing(dataset, consumed):
    whole = [row for step in read(dataset, 12) for row in tokens(step)]
    resumed = [row for step in read(dataset, 4, consumed=consumed) for row in tokens(step)]
    assert resumed == whole[consumed : consumed + len(resumed)]


def test_counter_counts_what_was_handed_out_not_what_was_read_ahead(dataset):
    reading = loader(dataset, consumed=16)
    for steps in range(1, 4):
        reading.next_step()
        assert reading.samples_consumed == 16 + steps * GLOBAL
    reading.close()


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_readers_ahead_change_nothing(dataset, workers, monkeypatch):
    monkeypatch.setattr("data_pipeline.loader.READY_STEPS", 3)  # so that they are passed often
    expected = [tokens(step) for step in read(dataset, 30, workers=1)]
    assert [tokens(step) for step in read(dataset, 30, workers=workers)] == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2, 5, 8])
def test_batches_of_other_sizes_from_a_sample_on(dataset, workers, start):
    sizes = [BatchSize(0, 8, 2), BatchSize(24, 12, 6), BatchSize(60, 4, 2)]
    begins = [0, 8, 16, 24, 36, 48, 60, 64, 68, 72]
    reading = BatchLoader(
        Blend([dataset], seed=7), sizes, data_parallel_rank=0, data_parallel_size=1,
        samples_consumed=begins[start], num_workers=workers,
    )  # fmt: skip
    everything = [row for step in read(dataset, 12, workers=0) for row in tokens(step)]
    for begin, end in pairwise(begins[start:]):
        step = reading.next_step()
        assert tokens(step) == everything[begin:end]
        micro = 6 if 24 <= begin < 60 else 2
        assert {batch.tokens.shape[0] for batch in step} == {micro}
        assert reading.samples_consumed == end
    reading.close()


def test_threads_end_with_their_loaders(dataset):
    def running() -> int:
        return sum(t.name.startswith("data") for t in threading.enumerate())

    before = running()
    closed, dropped = loader(dataset), loader(dataset)
    closed.next_step()
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.next_step()
    del dropped
    deadline = time.monotonic() + 10
    while running() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running() <= before  # threads of earlier tests may have ended, too


def test_sizes_that_do_not_divide_are_refused(dataset):
    with pytest.raises(ValueError, match="global_batch_size=8 is not a multiple"):
        loader(dataset, micro=3)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_validation_counts_each_sample_once_over_all_ranks(dataset, size, limit):
    ranks = [
        list(sequential_batches(dataset, 3, limit, data_parallel_rank=r, data_parallel_size=size))
        for r in range(size)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # collectives need equal counts
    batches = [batch for rank in ranks for batch in rank]
    assert all(batch.tokens.shape == (3, SEQ_LEN) for batch in batches)
    counted = sorted(
        row.tolist()
        for batch in batches
        for row, mask in zip(batch.tokens, batch.loss_mask, strict=True)
        if mask.any()
    )
    total = len(dataset) if limit is None else limit
    assert counted == sorted(dataset[i].tokens[:-1].tolist() for i in range(total))
    if limit is None:
        assert torch.stack([b.loss_mask.sum() for b in batches]).sum() == dataset.meta.loss_tokens


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip_byte, "checksum"), (cut_off, "bytes, but index.json says"), (Path.unlink, "No such")],
    ids=["flipped", "truncated", "missing"],
)
def test_damaged_shard_is_named_by_every_way_of_reading(damaged, damage, message):
    damage(damaged / "train" / "shard.000001.mds")
    match = rf"shard\.000001\.mds: .*{message}"
    dataset = PackedDataset(damaged / "train")
    dataset[0]  # the first shard is whole
    with pytest.raises(DataError, match=match):
        verify_dataset(damaged)
    with pytest.raises(DataError, match=match):
        list(sequential_batches(dataset, 2))
    reading = loader(dataset)
    with pytest.raises(DataError, match=match):
        [reading.next_step() for _ in range(len(dataset))]
    with pytest.raises(DataError, match=match):  # and again, rather than hang
        reading.next_step()
    reading.close()


def test_a_skipped_shard_is_padding_without_a_loss(prepared):
    dataset = PackedDataset(prepared / "train")
    dataset.skip(0)
    first, of_the_next = dataset[0], dataset[dataset.shards[0].samples]
    assert (first.tokens == dataset.meta.pad_id).all()
    assert not collate([first]).loss_mask.any()
    assert collate([of_the_next]).loss_mask.any()


def test_shard_that_changes_after_its_check_is_named(damaged):
    dataset = PackedDataset(damaged / "train")
    dataset[0]
    (damaged / "train" / "shard.000000.mds").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard\.000000\.mds: 0 bytes, but index\.json says"):
        dataset[1]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta.json", None, r"meta\.json: cannot be read"),
        ("meta.json", "{}", r"meta\.json is damaged \(format_version"),
        ("index.json", None, r"index\.json: cannot be read"),
        ("index.json", '{"shards": []}', r"index\.json: does not match the fingerprint"),
    ],
)
def test_missing_or_foreign_description_is_refused(damaged, file, content, message):
    path = damaged / "train" / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        PackedDataset(damaged / "train")


def test_edited_counts_are_found(damaged):
    file = damaged / "train" / "meta.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"samples": meta["samples"] + 1}))
    with pytest.raises(DataError, match="counts"):
        PackedDataset(damaged / "train")
    file.write_text(json.dumps(meta | {"padding": meta["padding"] + 1}))
    with pytest.raises(DataError, match="padding is"):
        verify_dataset(damaged)
    file.write_text(json.dumps(meta | {"format_version": 9}))
    with pytest.raises(DataError, match="format version 9"):
        PackedDataset(damaged / "train")


def test_data_that_does_not_fit_the_run_is_refused(prepared):
    train = prepared / "train"
    with pytest.raises(DataError, match=r"Set data\.seq_len=32"):
        PackedDataset(train, seq_len=64)
    tokenizer = json.loads((prepared / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(DataError, match=r"another tokenizer .*differ in normalizer\)"):
        PackedDataset(train, tokenizer=json.dumps(tokenizer).encode())
    with pytest.raises(DataError, match=r"model\.vocab_size is 299"):
        PackedDataset(train, vocab_size=299)
    with pytest.raises(DataError, match="no such folder"):
        PackedDataset(prepared / "nowhere")
    with pytest.raises(IndexError):
        PackedDataset(train)[10**6]


def test_config_refuses_unknown_fields():
    assert DataConfig(train="x").seq_len == 1024
    with pytest.raises(ValueError, match="seqlen"):
        DataConfig.model_validate({"train": "x", "seqlen": 3})
