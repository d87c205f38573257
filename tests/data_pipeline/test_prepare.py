import errno
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import claim, reading, unit
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.inspection import inspect_dataset, verify_dataset
from data_pipeline.meta import token_dtype
from data_pipeline.prepare import Progress, prepare
from data_pipeline.reading import documents
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.conftest import SEQ_LEN


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def split_texts(folder: Path) -> list[str]:
    """The documents of a dataset whose pieces are all whole."""
    tokenizer, dataset = load_tokenizer(folder.parent), PackedDataset(folder)
    texts = []
    for sample in (dataset[i] for i in range(len(dataset))):
        parts = np.split(sample.tokens, np.cumsum(sample.doc_lens)[:-1])
        for part in parts[:-1] if sample.num_pad else parts:
            assert part[-1] == tokenizer.eod_id
            texts.append(tokenizer.decode(part[:-1].tolist()))
    return texts


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_same_input_gives_the_same_bytes(corpus, tokenizer_file, tmp_path, packing):
    for name in ("a", "b"):
        prepare([corpus], tokenizer_file, tmp_path / name, SEQ_LEN, packing)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {"tokenizer.json", "train/index.json", "train/meta.json", "validation/meta.json"} < set(
        contents(tmp_path / "a")
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_every_document_is_in_exactly_one_split(corpus, tokenizer_file, tmp_path):
    metas = prepare([corpus], tokenizer_file, tmp_path / "o", 2000, validation_fraction=0.3)
    train, validation = (split_texts(tmp_path / "o" / s) for s in ("train", "validation"))
    assert Counter(train + validation) == Counter(d.text for d in documents([corpus]))
    assert len(train) == metas["train"].documents
    assert 0.15 < len(validation) / 120 < 0.45
    assert metas["train"].cut_documents == 0


def test_split_of_a_document_does_not_depend_on_others(corpus, tokenizer_file, tmp_path):
    prepare([corpus], tokenizer_file, tmp_path / "all", 2000, validation_fraction=0.3)
    half = tmp_path / "half"
    half.mkdir()
    for file in sorted(corpus.glob("*.txt"))[::2]:
        (half / file.name).write_bytes(file.read_bytes())
    prepare([half], tokenizer_file, tmp_path / "o", 2000, validation_fraction=0.3)
    whole = set(split_texts(tmp_path / "all" / "validation"))
    assert set(split_texts(tmp_path / "o" / "validation")) < whole


def test_counts_and_entropy_are_those_of_the_labels(prepared):
    dataset = PackedDataset(prepared / "train")
    labels: Counter[int] = Counter()
    tokens = 0
    for sample in (dataset[i] for i in range(len(dataset))):
        parts = np.split(sample.tokens, np.cumsum(sample.doc_lens)[:-1])
        for part in parts[:-1] if sample.num_pad else parts:
            tokens += part.size
            labels.update(part[1:].tolist())
    total = labels.total()
    entropy = -sum(c / total * math.log(c / total) for c in labels.values())
    meta = dataset.meta
    assert (meta.tokens, meta.loss_tokens) == (tokens, total)
    assert meta.tokens + meta.padding == meta.samples * (SEQ_LEN + 1)
    assert meta.unigram_entropy == pytest.approx(entropy, rel=1e-9)


def test_a_long_text_stays_one_document(tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PART_BYTES", 64)
    (tmp_path / "in").mkdir()
    texts = ["".join(f"{n} the state of scan {line}\n" for line in range(20)) for n in range(20)]
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number:02}.txt").write_text(text)
    metas = prepare(
        [tmp_path / "in"], tokenizer_file, tmp_path / "o", 1000, validation_fraction=0.3
    )
    found = [split_texts(tmp_path / "o" / split) for split in ("train", "validation")]
    assert sorted(found[0] + found[1]) == sorted(texts)
    assert [meta.documents for meta in metas.values()] == [len(split) for split in found]


def test_the_smaller_type_that_holds_every_id():
    assert [token_dtype(size).name for size in (300, 65_536, 65_537)] == [
        "uint16", "uint16", "uint32",
    ]  # fmt: skip


def test_large_vocabulary_is_stored_in_32_bits(corpus, tokenizer_file, tmp_path):
    content = json.loads(tokenizer_file.read_text())
    vocab = content["model"]["vocab"]
    vocab.update({f"unused{i}": i for i in range(len(vocab), 70_000)})
    (tmp_path / "large.json").write_text(json.dumps(content))
    prepare([corpus], tmp_path / "large.json", tmp_path / "o", SEQ_LEN, validation_fraction=0)
    assert inspect_dataset(tmp_path / "o")["train"]["token_dtype"] == "uint32"
    assert not (tmp_path / "o" / "validation").exists()


def test_progress_ends_at_the_whole_corpus(corpus, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(unit, "BATCH_BYTES", 5000)
    seen: list[Progress] = []
    prepare([corpus], tokenizer_file, tmp_path / "o", SEQ_LEN, progress=seen.append)
    assert len(seen) > 3
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert seen[-1].documents == 120


def test_inspect_and_verify(prepared):
    found = inspect_dataset(prepared)
    assert list(found) == ["train", "validation"]
    assert found["train"]["shards"] > 2
    assert found["train"]["fill_rate"] > 0.9
    assert "scan" in found["train"]["sample_0_text"]
    assert list(inspect_dataset(prepared / "train")) == ["train"]
    verify_dataset(prepared)
    with pytest.raises(DataError, match="no prepared data"):
        inspect_dataset(prepared.parent / "nowhere")


def test_existing_output_is_refused_and_untouched(corpus, tokenizer_file, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        prepare([corpus], tokenizer_file, tmp_path / "o", SEQ_LEN)
    assert contents(tmp_path) == {"o/thesis.txt": b"mine"}


def test_left_over_of_a_killed_run_is_replaced_but_no_other_folder(
    corpus, tokenizer_file, tmp_path
):
    (tmp_path / "o.tmp").mkdir()
    (tmp_path / "o.tmp" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="in the way"):
        prepare([corpus], tokenizer_file, tmp_path / "o", SEQ_LEN)
    assert contents(tmp_path) == {"o.tmp/thesis.txt": b"mine"}
    (tmp_path / "o.tmp" / claim.STATE).write_text("other work")
    prepare([corpus], tokenizer_file, tmp_path / "o", SEQ_LEN)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def bad_file(folder: Path) -> None:
    (folder / "zz.txt").write_bytes(b"caf\xe9")


def bad_line(folder: Path) -> None:
    (folder / "zz.jsonl").write_text("{")


@pytest.mark.parametrize("spoil", [bad_file, bad_line])
def test_bad_input_leaves_nothing_behind(tokenizer_file, tmp_path, spoil):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("fine " * 100)
    spoil(tmp_path / "in")
    with pytest.raises(DataError, match="zz"):
        prepare([tmp_path / "in"], tokenizer_file, tmp_path / "o", SEQ_LEN)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_full_disk_leaves_nothing_behind(corpus, tokenizer_file, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unit.SplitWriter, "_write", full)
    with pytest.raises(DataError, match="No space left"):
        prepare([corpus], tokenizer_file, tmp_path / "o", SEQ_LEN)
    assert not list(tmp_path.iterdir())


def test_missing_corpus_and_empty_split_are_refused(tokenizer_file, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        prepare([tmp_path / "nowhere"], tokenizer_file, tmp_path / "o", SEQ_LEN)
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(DataError, match="validation split"):
        prepare([tmp_path / "a.txt"], tokenizer_file, tmp_path / "o", SEQ_LEN)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="corpus is empty: its files hold no text"):
        prepare(
            [tmp_path / "a.txt"], tokenizer_file, tmp_path / "o", SEQ_LEN, validation_fraction=0
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_name_may_be_no_utf8(tokenizer_file, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"\xff.txt")).write_text("text")
    metas = prepare([tmp_path / "in"], tokenizer_file, tmp_path / "o", 64, validation_fraction=0)
    assert metas["train"].documents == 1
