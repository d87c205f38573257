"""Folders of models that somebody else made: nothing outside is read, nothing hangs."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_tools import tokenizer_file
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.importing import import_model
from checkpoints_tools.safetensors_files import SafetensorsFolder
from checkpoints_tools.single_gpu import ModelError
from pretrain.evaluation.models import ExportedModel
from pretrain.generate import END_OF_TEXT, run
from tests.checkpoints_tools.tiny_models import YARN, make_model
from tests.pretrain.command import paragraph, run_command
from tests.pretrain.test_generate import make_tokenizer

INDEX, WHOLE, NORM = "model.safetensors.index.json", "model.safetensors", "final_layernorm.weight"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two shards, secret/ beside it with a shard that fits."""
    folder = tmp_path_factory.mktemp("hostile")
    model = make_model(vocab_size=257, eos_token_id=0, pad_token_id=0)
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    (folder / "model").mkdir()
    (folder / "secret").mkdir()
    first, second = ({n: t for n, t in tensors.items() if (NORM in n) == last} for last in (0, 1))
    save_file(first, folder / "model/1.safetensors")
    save_file(second, folder / "model/2.safetensors")
    save_file(second, folder / "secret/2.safetensors")
    write_index(folder / "model", dict.fromkeys(first, "1.safetensors"), "2.safetensors")
    (folder / "model/config.json").write_text(model.config.to_json())
    make_tokenizer().save(str(folder / "model/tokenizer.json"))
    return folder


def write_index(model: Path, weight_map: Any, norm: Any) -> None:
    weight_map = {**weight_map, f"model.{NORM}": norm}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def read_index(model: Path) -> Any:
    return json.loads((model / INDEX).read_text())["weight_map"]


@pytest.fixture
def model(honest: Path, tmp_path: Path) -> Path:
    shutil.copytree(honest, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A reader that waits for a pipe fails rather than stops the suite."""

    def stop(*_: Any) -> None:
        raise TimeoutError("the reader hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS: dict[str, Callable[[Path], Any]] = {
    "generate": lambda folder: run(folder, "a", 1),
    "evaluate": lambda folder: ExportedModel(folder, device="cpu"),
    "import": lambda folder: import_model(folder, folder.parent / "imported", {}),
}


def refused(folder: Path, says: str, readers: tuple[str, ...] = tuple(READERS)) -> None:
    """Every reader refuses the folder with one line without controls, and writes nothing."""
    before = sorted(folder.parent.rglob("*"))
    for name in readers:
        with pytest.raises((ModelError, CheckpointError)) as caught:
            READERS[name](folder)
        message = str(caught.value)
        assert says in message, (name, message)
        assert message.isprintable(), name
        assert len(message) < 1500, name
    assert sorted(folder.parent.rglob("*")) == before


def test_the_honest_folder_is_read(model: Path) -> None:
    for read in READERS.values():
        read(model)
    stored = SafetensorsFolder(model)
    whole = stored.tensor("model.word_embed.weight")
    (part,) = (block for _, block in stored.blocks("model.word_embed.weight", range(5, 9)))
    assert torch.equal(part, whole[5:9])


# -- names in the index ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("../secret/2.safetensors", "'..'"),
        ("sub/../../secret/2.safetensors", "'..'"),
        ("{absolute}", "is an absolute path"),
        ("sub/2.safetensors", "names a folder"),
        ("linked/2.safetensors", "names a folder"),
        ("./2.safetensors", "'.'"),
        ("", "is empty"),
        (".", "'.'"),
        ("2\n.safetensors", "has control characters"),
        ("2\x1b[31m.safetensors", "has control characters"),
        ("2\0.safetensors", "has control characters"),
        ("x" * 300, "longer than 255 bytes"),
        (7, "valid string"),
        (None, "valid string"),
        (["2.safetensors"], "valid string"),
        ("3.safetensors", "lacks 3.safetensors"),
        ("link.safetensors", "is a link"),
        ("zero.safetensors", "is a link"),
        ("pipe.safetensors", "is a pipe"),
        ("sub", "is a folder"),
        ("config.json", "no safetensors header"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_the_index_names_files_beside_it(file: Any, says: str, model: Path) -> None:
    (model / "sub").mkdir()
    shutil.copyfile(model / "2.safetensors", model / "sub/2.safetensors")
    (model / "linked").symlink_to(model.parent / "secret")
    (model / "link.safetensors").symlink_to(model.parent / "secret/2.safetensors")
    (model / "zero.safetensors").symlink_to("/dev/zero")
    os.mkfifo(model / "pipe.safetensors")
    secret = model.parent / "secret/2.safetensors"
    file = str(secret) if file == "{absolute}" else file
    write_index(model, read_index(model), file)
    refused(model, says)


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[]", "valid dictionary"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": NaN}}', "not JSON"),
        ("[" * 10**6, "not JSON"),
        (json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(5000)}}), "lacks 0."),
    ],
    ids=["empty", "list", "no-map", "map-is-a-list", "nan", "deep", "thousands-of-files"],
)
def test_an_index_that_is_none(text: str, says: str, model: Path) -> None:
    (model / INDEX).write_text(text)
    refused(model, says)


def test_a_tensor_that_is_named_twice(model: Path) -> None:
    text = (model / INDEX).read_text()
    entry = f'"model.{NORM}": "2.safetensors"'
    for other in ("1.safetensors", "../secret/2.safetensors"):
        twice = entry.replace("2.safetensors", other)
        (model / INDEX).write_text(text.replace(entry, f"{entry}, {twice}"))
        refused(model, "2.safetensors" if ".." in other else "not in their files")


# -- what lies in the place of files ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device", "dangling"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "2.safetensors", INDEX, WHOLE])
def test_only_regular_files_are_read(name: str, kind: str, model: Path) -> None:
    path, moved = model / name, model.parent / "secret" / name
    if path.exists():
        shutil.move(path, moved)
    else:
        moved.write_text("")
        (model / INDEX).unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(moved if kind == "link" else "nowhere")
    shown = {"pipe": "is a pipe", "folder": "is a folder"}.get(kind, "is a link")
    refused(model, shown)


def test_sizes_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (model / "config.json").open("ab") as file:
        file.truncate(1 << 33)
    refused(model, "config.json is larger than")
    monkeypatch.setattr(tokenizer_file, "MAX_BYTES", 1000)
    with pytest.raises(ModelError, match="larger than 1,000 bytes"):
        tokenizer_file.read_tokenizer(model / "tokenizer.json")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 10**5, '{"model": {"type": "x"}}'])
def test_a_tokenizer_that_is_none(text: str, model: Path) -> None:
    (model / "tokenizer.json").write_text(text)
    refused(model, "is not a Hugging Face tokenizer", ("generate", "evaluate"))


# -- config.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1,000,000,000 is more than 3"),
        ({"num_hidden_layers": 4}, "num_hidden_layers = 4 is more than 3"),
        ({"hidden_size": 10**12}, "hidden_size ="),
        ({"vocab_size": 2 * 10**9}, "vocab_size · hidden_size ="),
        ({"intermediate_size": 10**15}, "intermediate_size ="),
        ({"head_dim": 10**12}, "head_dim ="),
        ({"state_dim": 10**12}, "state_dim ="),
        ({"num_attention_heads": 10**10, "num_key_value_heads": 10**10}, "num_attention_heads"),
        ({"ssd_conv_width": 10**9}, "ssd_conv_width ="),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings ="),
        ({"vocab_size": 10**18}, "vocab_size is a number of"),
        ({"num_hidden_layers": -(10**18)}, "num_hidden_layers is a number of"),
        ({"rope_theta": 10**400}, "rope_theta is a number of"),
        ({"eos_token_id": 10**400}, "eos_token_id is a number of"),
        ({"hidden_size": None}, "hidden_size=null is not int"),
        ({"hidden_size": [24]}, "hidden_size=[24] is not int"),
        ({"hidden_size": 24.0}, "hidden_size=24.0 is not int"),
        ({"eos_token_id": "0"}, 'eos_token_id="0" is not int'),
        ({"eos_token_id": -1}, "eos_token_id=-1 is no token"),
        ({"pad_token_id": 257}, "pad_token_id=257 is no token"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0 is not positive"),
        ({"rope_theta": 1.0}, "rope_theta=1.0 is not between"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 is not between"),
        ({"rope_scaling": []}, "rope_scaling=[] is not dict"),
        ({"rope_scaling": "yarn"}, 'rope_scaling="yarn" is not dict'),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "use one of"),
        ({"rope_scaling": {**YARN, "factor": [4.0]}}, "factor=[4.0]"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "factor='4'"),
        ({"rope_scaling": {**YARN, "factor": 0}}, "factor=0"),
        ({"rope_scaling": {**YARN, "beta_fast": 1e-320}}, "beta_fast=1e-320"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate=1"),
        ({"model_type": "x" * 5000}, "is not 'transxssm'"),
        ({"dtype": 32}, "dtype=32 is not str"),
        ({"evil\x1b[31m": 1}, "unknown fields: evil\\x1b[31m"),
        ({"x" * 100_000: 1}, "unknown fields: xxx"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_configuration_is_compared_with_the_tensors(
    changes: dict[str, Any], says: str, model: Path
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(model, says)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\0", "[" * 10**5, '{"a": 1e999}'])
def test_a_configuration_that_is_none(text: str, model: Path) -> None:
    (model / "config.json").write_text(text)
    refused(model, "unknown fields: a" if "999" in text else "is damaged")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(value: str, model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace("100.0", value))
    refused(model, "rope_theta=inf" if value == "1e999" else "not JSON")


# -- headers of safetensors ------------------------------------------------------------------------


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(change(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> Any:
        return {name: old | changes for name, old in header.items()}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header: [], "is damaged"),
        (lambda header: {"a": 1}, "is damaged"),
        (lambda header: {"__metadata__": 7, "a": {}}, "is damaged"),
        (lambda header: {}, "its header speaks of"),
        (lambda header: {"\x1b[31mred": header[f"model.{NORM}"]}, "has a name that no parameter"),
        (lambda header: {"x" * 10**5: header[f"model.{NORM}"]}, "has a name that no parameter"),
        (entry(shape=[-24]), "is damaged"),
        (entry(shape=[24.0]), "is damaged"),
        (entry(shape=[]), "is damaged"),
        (entry(shape=[0, 10**15]), "is damaged"),
        (entry(shape=[10**15]), "has other bytes"),
        (entry(shape=[1] * 10**5), "is damaged"),
        (entry(data_offsets=[0]), "is damaged"),
        (entry(data_offsets=[0, 10**18]), "is damaged"),
        (entry(data_offsets=[96, 192]), "has other bytes"),
        (entry(dtype="F64\x1b"), "is F64\\x1b, not F32"),
        (entry(dtype=None), "is damaged"),
        (entry(shape=[12]), "has other bytes"),
    ],
)
def test_a_header_that_is_none(
    change: Callable[[dict[str, Any]], Any], says: str, model: Path
) -> None:
    with_header(model / "2.safetensors", change)
    refused(model, says)


@pytest.mark.parametrize("length", [0, 7, 2**40, 2**64 - 1])
def test_the_length_of_a_header_is_bounded(length: int, model: Path) -> None:
    path = model / "2.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(model, "2.safetensors")
    path.write_bytes(b"abc")
    refused(model, "no safetensors header")


def test_a_file_that_shrinks_while_it_is_read(model: Path) -> None:
    stored = SafetensorsFolder(model)
    os.truncate(model / "1.safetensors", 3000)
    with pytest.raises(CheckpointError, match="ends too early"):
        stored.tensor("model.word_embed.weight")
    (model / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(stored.blocks("model.word_embed.weight"))


# -- the commands ----------------------------------------------------------------------------------


def test_training_does_not_start_from_what_lies_elsewhere(
    trained: Path, model: Path, tmp_path: Path
) -> None:
    """`load_weights_only` and `evaluate` with a shard, and with a tokenizer, from outside."""
    write_index(model, read_index(model), "../secret/2.safetensors")
    words = ("--checkpoint.load_weights_only", model, "--logging.run_dir", tmp_path / "run")
    allowed = ("--checkpoint.allow_model_change", "true", "--checkpoint.allow_tokenizer_change")
    one = ("--parallel.tensor", "1")
    (end,) = run_command("pretrain", trained / "config.toml", *words, *allowed, "true", *one)
    assert end.code == 1
    assert "'../secret/2.safetensors' has the part '..'" in paragraph(end.output)
    (end,) = run_command("evaluate", model, "--recall")
    assert end.code == 1
    assert "has the part '..'" in paragraph(end.output)
    shutil.move(model / "tokenizer.json", model.parent / "secret")
    (model / "tokenizer.json").symlink_to(model.parent / "secret/tokenizer.json")
    (end,) = run_command("pretrain", trained / "config.toml", *words, *allowed, "true", *one)
    assert "tokenizer.json is a link" in paragraph(end.output)
    assert END_OF_TEXT not in end.output
