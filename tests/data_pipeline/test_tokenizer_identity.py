"""Data that was prepared with a tokenizer belongs to every file of the same tokenizer."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors  # type: ignore[import-untyped]

from checkpoints_tools.hugging_face import write_tokenizer
from checkpoints_tools.single_gpu import TransXSSMConfig
from data_pipeline.blend import Blend, Stage
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from tests.checkpoints_tools.tiny_models import make_model
from tests.data_pipeline.conftest import SEQ_LEN


@pytest.fixture(scope="module")
def adding(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, saved with a token in front of texts, truncation, padding, dropout."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=600)
    tokenizer.model.dropout = 0.5
    folder = tmp_path_factory.mktemp("adding")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def data(adding: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("added") / "o"
    prepare([corpus], adding, out, SEQ_LEN, validation_fraction=0.2, shard_bytes=4096)
    return out


def described() -> TransXSSMConfig:
    return make_model(vocab_size=300, eos_token_id=0, pad_token_id=1).config


def test_what_a_tokenizer_adds_does_not_come_into_the_data(data: Path, prepared: Path) -> None:
    """Dropout does not either: the shards are those of the tokenizer without all of it."""
    for name in ("train", "validation"):
        index = [(folder / name / "index.json").read_bytes() for folder in (data, prepared)]
        assert index[0] == index[1]


def test_an_export_has_the_tokenizer_of_the_data(data: Path, adding: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, described(), adding)
    exported = (tmp_path / "tokenizer.json").read_bytes()
    assert exported != adding.read_bytes()
    assert json.loads(exported)["model"]["dropout"] is None
    for name in ("train", "validation"):
        assert len(PackedDataset(data / name, tokenizer=exported)) > 0


def test_data_of_two_files_of_one_tokenizer_goes_together(data: Path, prepared: Path) -> None:
    folders = [prepared / "train", data / "train"]
    stages = [Stage(0, (0.5, 0.5))]
    blend = Blend([PackedDataset(f) for f in folders], seed=0, names=["a", "b"], stages=stages)
    assert len(blend.names) == 2
    (data / "tokenizer.json").rename(data / "aside")
    try:
        with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
            Blend([PackedDataset(f) for f in folders], seed=0, names=["a", "b"], stages=stages)
    finally:
        (data / "aside").rename(data / "tokenizer.json")


def test_data_prepared_again_with_another_file_is_the_same_data(data: Path, prepared: Path) -> None:
    old, new = (Blend([PackedDataset(f / "train")], seed=0) for f in (prepared, data))
    assert old.fingerprint != new.fingerprint
    assert old.fingerprint == new.fingerprint_with(new.stages, old.meta.tokenizer_hash)
