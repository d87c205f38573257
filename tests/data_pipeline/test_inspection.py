"""`data verify` and `data inspect` trust nothing, and what is not there is no sound data."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.inspection import inspect_dataset, verify_dataset
from data_pipeline.meta import fingerprint
from tests.data_pipeline.test_storage import flip

PLACES: dict[str, Callable[[Path], str]] = {"folder": str, "URL": lambda path: f"file://{path}"}
place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@place
def test_no_data_is_an_error(place: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "empty/sub").mkdir(parents=True)
    for folder in ("empty", "nowhere"):
        for look in (verify_dataset, inspect_dataset):
            with pytest.raises(DataError, match=rf"{folder}: no prepared data there"):
                look(place(tmp_path / folder))


@place
@pytest.mark.parametrize("lost", [["train"], ["train", "validation"]])
def test_a_split_that_has_lost_its_description_is_named(
    lost: list[str], place: Callable[[Path], str], damaged: Path
) -> None:
    verify_dataset(place(damaged))
    for split in lost:
        (damaged / split / "meta.json").unlink()
    for look in (verify_dataset, inspect_dataset):
        with pytest.raises(DataError, match=r"train/meta\.json: cannot be"):
            look(place(damaged))
    for split in lost:
        (damaged / split / "index.json").unlink()
    with pytest.raises(DataError, match=r"train/meta\.json: cannot be"):
        verify_dataset(place(damaged))


@place
def test_what_was_sound_before_is_looked_at_again(
    place: Callable[[Path], str], damaged: Path
) -> None:
    train = PackedDataset(place(damaged / "train"))
    list(map(train.__getitem__, range(len(train))))  # now markers and copies are there
    verify_dataset(place(damaged))
    shard = damaged / "train/shard.000001.mds"
    stat = shard.stat()
    flip(shard)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"shard\.000001\.mds: checksum"):
        verify_dataset(place(damaged))


@pytest.mark.parametrize(
    "field",
    ["documents", "cut_documents", "unigram_entropy", "loss_tokens", "tokens", "vocab_size"],
)
def test_changed_counts_are_named(field: str, damaged: Path) -> None:
    file = damaged / "train/meta.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {field: meta[field] + 1000}))
    with pytest.raises(DataError, match=rf"{field} is .*, but the shards and the tokenizer say"):
        verify_dataset(damaged)


@pytest.mark.parametrize(("field", "message"), [("eod_id", "documents is"), ("pad_id", "padded")])
def test_changed_special_tokens_are_named(field: str, message: str, damaged: Path) -> None:
    file = damaged / "train/meta.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {field: 7}))
    with pytest.raises(DataError, match=message):
        verify_dataset(damaged)


@place
def test_another_tokenizer_is_named(place: Callable[[Path], str], damaged: Path) -> None:
    (damaged / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not the tokenizer that"):
        verify_dataset(place(damaged))
    (damaged / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be"):
        verify_dataset(place(damaged / "train"))


def test_nothing_is_left_behind(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verify_dataset(f"file://{shutil.copytree(prepared, tmp_path / 'data')}")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe\x00", b'{"model": "\x1b[31m"}'], ids=str)
def test_a_tokenizer_that_cannot_be_read_is_named(content: bytes, damaged: Path) -> None:
    (damaged / "tokenizer.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    for split in ("train", "validation"):
        file, index = damaged / split / "meta.json", (damaged / split / "index.json").read_bytes()
        changed = {"tokenizer_hash": digest, "fingerprint": fingerprint(index, digest)}
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    for look in (verify_dataset, inspect_dataset):
        with pytest.raises(DataError, match=r"damaged/tokenizer\.json: not a Hugging Face") as e:
            look(damaged)
        assert str(e.value).isprintable()
