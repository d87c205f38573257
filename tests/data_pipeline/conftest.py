"""A small corpus, tokenizer and dataset, made once for the session."""

import random
import shutil
from pathlib import Path

import pytest

from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer

SEQ_LEN = 32


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 texts of 1 to 200 words, with accents and emoji."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["the", "state", "of", "a", "scan", "is", "été", "über", "日本", "🙂", "mixes\n"]
    for number in range(120):
        text = " ".join(rng.choices(words, k=rng.randint(1, 200)))
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(corpus: Path) -> Path:
    return train_tokenizer([corpus], corpus.parent / "tokenizer.json", 300)


@pytest.fixture(scope="session")
def prepared(corpus: Path, tokenizer_file: Path) -> Path:
    """OUT of `prepare` with train and validation, several shards each; do not change it."""
    out = corpus.parent / "prepared"
    prepare([corpus], tokenizer_file, out, SEQ_LEN, validation_fraction=0.2, shard_bytes=4096)
    return out


@pytest.fixture(scope="session")
def prepared_tars(corpus: Path, tokenizer_file: Path) -> Path:
    """The same samples as `prepared`, as WebDataset shards."""
    out = corpus.parent / "prepared-tars"
    prepare(
        [corpus], tokenizer_file, out, SEQ_LEN, validation_fraction=0.2, shard_bytes=40960,
        format="webdataset",
    )  # fmt: skip
    return out


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared` to break."""
    return Path(shutil.copytree(prepared, tmp_path / "damaged"))
