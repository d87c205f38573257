"""Checkpoints and exports belong to data of the same tokenizer, whatever its file looks like."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, processors

from checkpoints_tools.averaging import average_checkpoints
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.importing import import_model
from checkpoints_tools.manifest import read_manifest
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.meta import fingerprint
from pretrain.config import Config, load_config
from pretrain.evaluation.command import Asked, evaluate
from pretrain.evaluation.models import ExportedModel
from pretrain.real_text import real_tokens
from pretrain.resume import _weights_source
from pretrain.same_run import check_same_run
from pretrain.sources import open_blend

STEP = "run/checkpoints/step-00000004"


def rewritten(content: bytes) -> bytes:
    """The same tokenizer, with what trainers and other programs save along."""
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=32)
    text: str = tokenizer.to_str(pretty=False)
    return text.encode()


def lower(content: bytes) -> bytes:
    """Another tokenizer of the same vocabulary."""
    return json.dumps(json.loads(content) | {"normalizer": {"type": "Lowercase"}}).encode()


@pytest.fixture
def again(tiny_data: Path, tmp_path: Path) -> Path:
    """The data as if prepared again from a rewritten tokenizer."""
    out = Path(shutil.copytree(tiny_data, tmp_path / "again"))
    change_tokenizer(out, rewritten((out / "tokenizer.json").read_bytes()))
    return out


def change_tokenizer(out: Path, content: bytes) -> None:
    (out / "tokenizer.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    for name in ("train", "validation"):
        file = out / name / "meta.json"
        index = (out / name / "index.json").read_bytes()
        changed = {"tokenizer_hash": digest, "fingerprint": fingerprint(index, digest)}
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def configured(trained: Path, data: Path, **fields: Any) -> Config:
    words = [f"--data.train={data / 'train'}", f"--data.validation={data / 'validation'}"]
    return load_config(
        trained / "config.toml", [*words, *(f"--{n}={v}" for n, v in fields.items())]
    )


def test_data_prepared_again_goes_on_with_the_run(trained: Path, again: Path) -> None:
    config = configured(trained, again)
    check_same_run(trained / STEP, config, open_blend(config))
    change_tokenizer(again, lower((again / "tokenizer.json").read_bytes()))
    with pytest.raises(CheckpointError, match=r"another tokenizer .*differ in normalizer\)"):
        check_same_run(trained / STEP, config, open_blend(config))


def test_other_samples_are_other_data(trained: Path, again: Path) -> None:
    shutil.rmtree(again / "train")
    shutil.copytree(again / "validation", again / "train")
    config = configured(trained, again)
    with pytest.raises(CheckpointError, match="was trained with another data"):
        check_same_run(trained / STEP, config, open_blend(config))


def test_weights_of_an_export_are_of_the_same_tokenizer(
    trained: Path, again: Path, tmp_path: Path
) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    config = configured(trained, again, **{"checkpoint.load_weights_only": tmp_path / "model"})
    for source in (tmp_path / "model", trained / STEP):
        _weights_source(source, config, open_blend(config))
    change_tokenizer(again, lower((again / "tokenizer.json").read_bytes()))
    for source in (tmp_path / "model", trained / STEP):
        with pytest.raises(CheckpointError, match=r"another tokenizer .*differ in normalizer"):
            _weights_source(source, config, open_blend(config))


def test_an_import_wants_the_tokenizer_and_not_only_its_vocabulary(
    trained: Path, tmp_path: Path
) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    own = (tmp_path / "model/tokenizer.json").read_bytes()
    import_model(tmp_path / "model", tmp_path / "a", {}, tokenizer=rewritten(own))
    assert (tmp_path / "a/step-00000000/tokenizer.json").read_bytes() == rewritten(own)
    with pytest.raises(CheckpointError, match=r"another tokenizer .*differ in normalizer\)"):
        import_model(tmp_path / "model", tmp_path / "b", {}, tokenizer=lower(own))


def test_an_average_wants_one_tokenizer(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    own = (tmp_path / "model/tokenizer.json").read_bytes()
    steps = [import_model(tmp_path / "model", tmp_path / "a", {})]
    steps.append(import_model(tmp_path / "model", tmp_path / "b", {}, tokenizer=rewritten(own)))
    assert average_checkpoints(steps, tmp_path / "mean").exists()
    (tmp_path / "model/tokenizer.json").write_bytes(lower(own))
    steps.append(import_model(tmp_path / "model", tmp_path / "c", {}))
    with pytest.raises(CheckpointError, match=r"different tokenizers .*differ in normalizer\)"):
        average_checkpoints(steps, tmp_path / "other")


def test_an_export_is_evaluated_on_the_data_it_was_trained_on(
    trained: Path, again: Path, tmp_path: Path
) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    model = ExportedModel(tmp_path / "model")
    asked = Asked(data=(str(again / "validation"),), limit=1)
    assert evaluate(model, asked).results[asked.data[0]]["tokens"] > 0
    change_tokenizer(again, lower((again / "tokenizer.json").read_bytes()))
    with pytest.raises(DataError, match=r"another tokenizer .*differ in normalizer"):
        evaluate(model, asked)


def test_text_to_compare_with_is_neither_cut_nor_filled(trained: Path, tmp_path: Path) -> None:
    state = read_manifest(trained / STEP)
    own = (trained / STEP / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(rewritten(own))
    elsewhere = state | {"config": state["config"] | {"data": {"train": str(tmp_path)}}}
    ids, where = real_tokens(elsewhere, tmp_path / "tokenizer.json", 100)
    (tmp_path / "tokenizer.json").write_bytes(own)
    assert (ids, where) == real_tokens(elsewhere, tmp_path / "tokenizer.json", 100)
    assert len(ids) == 100


# -- in the hands of transformers ----------------------------------------------------------------


def test_new_special_tokens_of_an_export_are_one_id_each(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    known = len(tokenizer)
    end = tokenizer.eos_token
    assert tokenizer(f"a{end}").input_ids[-1] == tokenizer.eos_token_id
    plain = tokenizer(f"a{end}", split_special_tokens=True).input_ids
    data = PackedDataset(_train(trained))
    assert data.meta.eod_id == tokenizer.eos_token_id not in plain
    chat = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": chat})
    tokenizer.save_pretrained(tmp_path / "chat")
    for one in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")):
        assert [one(token).input_ids for token in chat] == [[known], [known + 1]]
        ids = one(f"{chat[0]}the{chat[1]}{end}").input_ids
        assert (ids[0], ids[-2], ids[-1]) == (known, known + 1, one.eos_token_id)


def _train(trained: Path) -> str:
    return load_config(trained / "config.toml", []).data.train


def test_the_card_says_what_to_know_of_tokens(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    for text in (
        "every document ended with `<|endoftext|>` (id 0)", "split_special_tokens=True",
        "`<|padding|>` (id 1), on the left", "one id each, from 300 on",
        "has 301 rows, so that 1 new tokens", "It is `bos_token` too",
    ):  # fmt: skip
        assert text in card, text
