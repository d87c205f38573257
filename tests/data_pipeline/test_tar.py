"""WebDataset shards: the samples of MDS ones, by index and through the library itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset  # type: ignore[import-untyped]

from data_pipeline.blend import Blend
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.inspection import inspect_dataset, verify_dataset
from data_pipeline.loader import BatchLoader, BatchSize
from data_pipeline.prepare import prepare
from tests.data_pipeline.conftest import SEQ_LEN
from tests.data_pipeline.test_prepare import contents


def test_samples_are_those_of_mds(prepared: Path, prepared_tars: Path) -> None:
    for split in ("train", "validation"):
        one, two = PackedDataset(prepared / split), PackedDataset(prepared_tars / split)
        assert len(one) == len(two)
        assert len(two.shards) > 1
        for index in range(len(one)):
            a, b = one[index], two[index]
            assert np.array_equal(a.tokens, b.tokens)
            assert a.tokens.dtype == b.tokens.dtype
            assert np.array_equal(a.doc_lens, b.doc_lens)
            assert a.num_pad == b.num_pad
    verify_dataset(prepared_tars)
    assert inspect_dataset(prepared_tars)["train"]["format"] == "webdataset"


def test_batches_are_those_of_mds(prepared: Path, prepared_tars: Path) -> None:
    read = []
    for folder in (prepared, prepared_tars):
        loader = BatchLoader(
            Blend([PackedDataset(folder / "train")], seed=1), [BatchSize(0, 6, 3)],
            data_parallel_rank=0, data_parallel_size=1, samples_consumed=60,
        )  # fmt: skip
        read.append([batch.tokens.tolist() for _ in range(40) for batch in loader.next_step()])
        loader.close()
    assert read[0] == read[1]


def test_the_library_reads_them_too(prepared_tars: Path) -> None:
    dataset = PackedDataset(prepared_tars / "train")
    shards = sorted(str(path) for path in (prepared_tars / "train").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())
    assert len(samples) == len(dataset)
    for index, sample in enumerate(samples):
        assert np.array_equal(sample["tokens.npy"], dataset[index].tokens)
        assert sample["json"]["doc_lens"] == dataset[index].doc_lens.tolist()


def test_same_input_gives_the_same_bytes(
    corpus: Path, tokenizer_file: Path, prepared_tars: Path, tmp_path: Path
) -> None:
    prepare(
        [corpus], tokenizer_file, tmp_path / "o", SEQ_LEN, validation_fraction=0.2,
        shard_bytes=40960, format="webdataset",
    )  # fmt: skip
    assert contents(tmp_path / "o") == contents(prepared_tars)


@pytest.mark.parametrize("name", ["shard.000001.tar", "shard.000001.offsets.npy"])
def test_a_damaged_file_is_named(prepared_tars: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(prepared_tars, tmp_path / "o")) / "train"
    content = bytearray((folder / name).read_bytes())
    content[600 % len(content)] ^= 1
    (folder / name).write_bytes(content)
    dataset = PackedDataset(folder)
    with pytest.raises(DataError, match=f"{name}: checksum"):
        list(map(dataset.__getitem__, range(len(dataset))))
