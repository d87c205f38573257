"""Exports: what is written, what is refused, and that a wrong tensor does not pass."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.checkpoint_layouts import stored_tensors
from benchmarks.ranks import run_ranks
from checkpoints_tools import export, safetensors_files, stored
from checkpoints_tools.averaging import average_checkpoints
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.importing import import_model
from checkpoints_tools.manifest import read_manifest
from checkpoints_tools.model_card import model_card, place_name
from checkpoints_tools.model_folder import load_model
from checkpoints_tools.source import longest_sequence, open_source, single_gpu_config
from checkpoints_tools.stored import StoredTensors
from checkpoints_tools.stored_writer import write_untrained_state
from tests.pretrain.command import paragraph, run_command

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IDS = torch.randint(0, 300, (1, 90), generator=torch.Generator().manual_seed(5))


def read_all(model: Path) -> dict[str, torch.Tensor]:
    """By the library, whichever file they are in."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_files_hold_the_weights_and_no_more(
    dtype: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 1000)
    export_checkpoint(trained / "run", tmp_path / "one", dtype)
    export_checkpoint(trained / "run", tmp_path / "many", dtype, max_shard_bytes=20_000)
    expected = stored_tensors(trained / "run/checkpoints/step-00000004")
    weights = {n.removeprefix("weight."): t for n, t in expected.items() if n.startswith("weight.")}
    assert [p.name for p in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    single = {files[0].name} if dtype == "fp32" else set()  # the embedding alone is larger
    assert all(path.stat().st_size <= 20_000 for path in files if path.name not in single)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: path.name
        for path in files
        for name in safe_open(path, "pt").keys()  # noqa: SIM118
    }
    for model in ("one", "many"):
        found = read_all(tmp_path / model)
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            kept = name.endswith(("A_log", "dt_bias", "ssd.D"))
            assert torch.equal(found[name], weight.to(torch.float32 if kept else DTYPES[dtype]))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    with torch.no_grad():
        one, many = (load_model(tmp_path / model)(IDS) for model in ("one", "many"))
    assert torch.equal(one, many)


def test_card_says_where_it_comes_from(trained: Path, tmp_path: Path) -> None:
    parameters = export_checkpoint(trained / "run", tmp_path / "model")
    state = read_manifest(trained / "run/checkpoints/step-00000004")
    card = (tmp_path / "model/README.md").read_text()
    for value in (
        f"{parameters:,}", f"{state['tokens']:,}", state["data_fingerprint"],
        state["git_revision"] or "not recorded", "| source checkpoint | run, step-00000004 |",
    ):  # fmt: skip
        assert value in card


def test_card_says_how_to_load_and_what_it_was_trained_on(trained: Path, tmp_path: Path) -> None:
    source = open_source(trained / "run/checkpoints/step-00000004", checksums=False)
    manifest = source.manifest | {"evaluation": {"step": 2, "validation_loss": 5.43211}}
    data = place_name(manifest["config"]["data"]["train"])
    assert data not in ("", "train")
    config = single_gpu_config(manifest, "fp32")
    card = model_card(replace(source, manifest=manifest), config, 1, [])
    for text in (
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True",
        "model.generate(",
        f"| training data | {data} |",
        f"| longest training sequences | {manifest['config']['data']['seq_len']} tokens |",
        "| validation loss | 5.4321 nats a token, after step 2 |",
    ):
        assert text in card
    code = card.split("```python")[1].split("```")[0]
    compile(code, "README.md", "exec")


def test_export_names_no_folder_of_the_machine(trained: Path, tmp_path: Path) -> None:
    steps = [trained / f"run/checkpoints/step-0000000{n}" for n in (2, 4)]
    export_checkpoint(steps[1], tmp_path / "model")
    average_checkpoints(steps, tmp_path / "average")
    import_model(tmp_path / "model", tmp_path / "imported", {})
    for made in ("average", "imported"):
        export_checkpoint(tmp_path / made, tmp_path / f"of-{made}")
    card = (tmp_path / "of-average/README.md").read_text()
    assert "| average of | step 2 (" in card
    assert "| imported from | model |" in (tmp_path / "of-imported/README.md").read_text()
    for folder in ("model", "of-average", "of-imported"):
        for file in (tmp_path / folder).iterdir():
            content = file.read_bytes()
            assert str(tmp_path.parent).encode() not in content, file
            assert str(trained).encode() not in content, file


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/mine/train", "mine"),
        ("/home/someone/fineweb/train/", "fineweb"),
        ("s3://bucket/c4-en/train?region=x", "c4-en"),
        ("https://user:secret@host/train", "host"),
        ("~/x/validation", "x"),
        ("train", "train"),
        ("", ""),
    ],
)
def test_data_are_named_by_their_folder(path: str, name: str) -> None:
    assert place_name(path) == name


def test_lengths_follow_from_what_was_trained(trained: Path, tmp_path: Path) -> None:
    manifest = read_manifest(trained / "run/checkpoints/step-00000004")
    trained_on = manifest["config"]["data"]["seq_len"]
    assert manifest["longest_sequence"] == trained_on
    assert trained_on < manifest["config"]["model"]["max_position_embeddings"]
    export_checkpoint(trained / "run", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    tokenizer = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert config["max_position_embeddings"] == tokenizer["model_max_length"] == trained_on


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"longest_sequence": 64, "tokens": 9}, 64),
        ({"longest_sequence": 9999, "tokens": 9}, 256),
        ({"tokens": 9}, 128),  # an older manifest
        ({"tokens": 0}, 256),
        ({"longest_sequence": None, "tokens": 0}, 256),
    ],
)
def test_longest_sequence_of_a_manifest(state: dict[str, Any], expected: int) -> None:
    data = {"seq_len": 32, "sources": [{"seq_len": 128}, {"seq_len": 0}]}
    config = {"model": {"max_position_embeddings": 256}, "data": data}
    assert longest_sequence({"config": config} | state) == expected


# -- refused ---------------------------------------------------------------------------------------


def rewritten(steps: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The newest checkpoint with other weights, else as a run would have saved it."""
    from checkpoints_tools import folder as folders

    step_dir = steps / "step-00000004"
    manifest = read_manifest(step_dir)
    tensors = stored_tensors(step_dir)
    weights = {n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")}
    change(weights)
    other = steps.parent / "other"
    temporary = folders.begin(other, 4)
    shutil.copyfile(step_dir / "tokenizer.json", temporary / "tokenizer.json")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    write_untrained_state(temporary, shapes, lambda n: iter([(range(len(weights[n])), weights[n])]))
    return folders.commit(other, 4, {n: v for n, v in manifest.items() if n != "files"})


NAME = "model.layers.1.attn.q_proj.weight"


def missing(weights: dict[str, torch.Tensor]) -> None:
    del weights[NAME]


def unknown(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.word_embed.weight"]


def other_shape(weights: dict[str, torch.Tensor]) -> None:
    weights[NAME] = weights[NAME][:-1].clone()


def overflowing(weights: dict[str, torch.Tensor]) -> None:
    weights[NAME][3, 3] = 70_000.0
    weights["model.layers.0.ssd.A_log"][0] = 70_000.0  # stays float32


def not_a_number(weights: dict[str, torch.Tensor]) -> None:
    weights[NAME][3, 3] = float("nan")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (missing, f"weight.{NAME} is missing"),
        (unknown, "weight.lm_head.weight is not of the model"),
        (other_shape, f"weight.{NAME} is float32"),
        (overflowing, f"these do not fit: {NAME} .up to 7e.04.; export with"),
        (not_a_number, f"NaN or infinity in {NAME}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_the_model_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], found: str, steps: Path, tmp_path: Path
) -> None:
    step_dir = rewritten(steps, change)
    with pytest.raises(CheckpointError, match=found):
        export_checkpoint(step_dir, tmp_path / "model", "fp16")
    assert not list(tmp_path.glob("*model*"))


def test_damaged_file_is_refused(steps: Path, tmp_path: Path) -> None:
    file = steps / "step-00000004/rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors has checksum"):
        export_checkpoint(steps, tmp_path / "model")
    assert not list(tmp_path.glob("*model*"))


def test_full_disk_and_interruption_leave_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_checkpoint(trained / "run", tmp_path / "model")
    monkeypatch.setattr(export, "model_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(trained / "run", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_plan_keeps_order_and_size() -> None:
    tensors = [safetensors_files.Planned(str(i), (100, i + 1), torch.float32) for i in range(30)]
    for size in (1, 2_000, 7_000, 50_000, 10**6):
        files = safetensors_files.plan_files(tensors, size)
        assert [t for part in files.values() for t in part] == tensors
        assert all(len(p) == 1 or sum(t.num_bytes for t in p) < size for p in files.values())
    assert list(files) == ["model.safetensors"]


# -- compared with the training code ---------------------------------------------------------------


def compared(step_dir: Path, model: Path, dtype: str) -> list[Any]:
    from checkpoints_tools.comparison import compare_export

    return compare_export(step_dir, model, IDS, dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_export_computes_what_training_does(dtype: str, trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "run", tmp_path / "model", dtype)
    step_dir = trained / "run/checkpoints/step-00000004"
    (found,) = run_ranks(1, compared, step_dir, tmp_path / "model", dtype)
    assert [d.what for d in found[:8]] == [
        "embedding", "layer 0 (ssd)", "layer 1 (attention)", "layer 2 (ssd)",
        "layer 3 (attention)", "final norm", "head", "logits, end to end",
    ]  # fmt: skip
    assert all(d.within for d in found)
    exact = found if dtype == "fp32" else found[8:]
    assert len(exact) == 8
    assert max(d.worst for d in exact) < 2e-6
    if dtype != "fp32":
        assert 1e-5 < max(d.worst / d.bound for d in found[:8]) < 0.5


def outputs_only(step_dir: Path, model: Path, dtype: str) -> tuple[str, list[Any]]:
    """What each of the two comparisons says by itself."""
    from checkpoints_tools import comparison

    try:
        compared(step_dir, model, dtype)
        exact = ""
    except CheckpointError as error:
        exact = str(error)
    comparison.compare_tensors = lambda *_: None  # type: ignore[assignment]
    return exact, compared(step_dir, model, dtype)


def one_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.ssd.x_proj.weight"][1, 2] += 0.1


def swapped_layers(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.0.")]:
        other = name.replace("layers.0.", "layers.2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def swapped_projections(tensors: dict[str, torch.Tensor]) -> None:
    b, c = (f"model.layers.0.ssd.{kind}_proj.weight" for kind in "bc")
    tensors[b], tensors[c] = tensors[c], tensors[b]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("change", "layers"),
    [(one_value, {2}), (swapped_layers, {0, 2}), (swapped_projections, {0})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_tensor_is_found_in_its_layer(
    change: Callable[[dict[str, torch.Tensor]], None],
    layers: set[int],
    dtype: str,
    trained: Path,
    tmp_path: Path,
) -> None:
    export_checkpoint(trained / "run", tmp_path / "model", dtype)
    tensors = read_all(tmp_path / "model")
    change(tensors)
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    step_dir = trained / "run/checkpoints/step-00000004"
    ((exact, found),) = run_ranks(1, outputs_only, step_dir, tmp_path / "model", dtype)
    assert f"model.layers.{min(layers)}." in exact
    beyond = {d.what for d in found if not d.within}
    wrong = {f"layer {i} (ssd)" for i in layers}
    assert beyond == wrong | {"logits, end to end"}


def test_config_that_is_read_otherwise_is_found(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "run", tmp_path / "model", "bf16")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5000.0}))
    step_dir = trained / "run/checkpoints/step-00000004"
    (found,) = run_ranks(1, compared, step_dir, tmp_path / "model", "bf16")
    assert {d.what for d in found if not d.within} >= {"layer 0 (ssd)", "layer 1 (attention)"}


def break_the_export() -> None:
    def blocks(self: Any, tensor: Any) -> Any:
        for block in whole(self, tensor):
            yield block * 2 if tensor.name == NAME else block

    whole = export.Conversion.blocks
    export.Conversion.blocks = blocks  # type: ignore[method-assign]


def test_command_verifies_and_leaves_nothing_that_is_wrong(trained: Path, tmp_path: Path) -> None:
    words = ["checkpoint", "export", trained / "run", tmp_path / "model", "--dtype", "bf16"]
    (end,) = run_command(*words, before=break_the_export)
    assert end.code == 1
    assert f"{NAME} is not that of" in paragraph(end.output)
    assert not list(tmp_path.glob("*model*"))
    (end,) = run_command(*words, "--max-shard-size", "50KB")
    assert end.code == 0, end.output
    assert "logits, end to end" in end.output
    assert (tmp_path / "model/model.safetensors.index.json").exists()
    (end,) = run_command(*words, "--max-shard-size", "50KB")
    assert "exists and is not empty; name a new folder" in paragraph(end.output)


def test_text_for_comparing_falls_back_to_python(trained: Path, tmp_path: Path) -> None:
    from pretrain.real_text import real_tokens

    step_dir = trained / "run/checkpoints/step-00000004"
    state = read_manifest(step_dir)
    ids, where = real_tokens(state, step_dir / "tokenizer.json", 100)
    assert (len(ids), where) == (100, state["config"]["data"]["validation"])
    state["config"]["data"] |= {"train": str(tmp_path), "validation": ""}
    ids, where = real_tokens(state, step_dir / "tokenizer.json", 100)
    assert len(ids) == 100
    assert where.endswith(("LICENSE.txt", ".py"))
    assert max(ids) < 300
    assert StoredTensors(step_dir, state["files"]).shapes("weight")["model.word_embed.weight"] == (
        301,
        32,
    )


def test_no_engine_is_imported_without_comparing(trained: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from checkpoints_tools.averaging import average_checkpoints
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.importing import import_model
from pathlib import Path
out = Path({str(tmp_path)!r})
export_checkpoint(Path({str(trained / "run")!r}), out / "model")
import_model(out / "model", out / "imported", {{}})
assert not [m for m in sys.modules if m.partition(".")[0] in ("megatron", "deepspeed")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def killed_while_writing() -> None:
    def card(*_: Any) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    export.model_card = card


def test_kill_leaves_nothing_at_the_name_and_the_next_try_works(
    trained: Path, tmp_path: Path
) -> None:
    words = ["checkpoint", "export", trained / "run", tmp_path / "model", "--no-verify"]
    (end,) = run_command(*words, before=killed_while_writing)
    assert end.code == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".model.unfinished"]
    (end,) = run_command(*words)
    assert end.code == 0, end.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_its_own_folder_is_removed(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp/mine").write_text("")
    export_checkpoint(trained / "run", tmp_path / "model")
    assert (tmp_path / "model.tmp/mine").exists()
    assert len(list(tmp_path.iterdir())) == 2


def commit_another() -> None:
    """The run commits a newer step as soon as the export is written."""

    def card(source: Any, *arguments: Any) -> str:
        from checkpoints_tools import folder as folders

        steps = source.step_dir.parent
        temporary = folders.begin(steps, 5)
        for path in (steps / "step-00000002").iterdir():
            if path.name != "manifest.json":
                shutil.copyfile(path, temporary / path.name)
        state = {n: v for n, v in source.manifest.items() if n not in ("files", "step")}
        folders.commit(steps, 5, state)
        return whole(source, *arguments)

    whole = export.model_card
    export.model_card = card


def test_export_is_compared_with_the_step_it_was_made_of(steps: Path, tmp_path: Path) -> None:
    (end,) = run_command("checkpoint", "export", steps, tmp_path / "model", before=commit_another)
    assert end.code == 0, end.output
    assert (steps / "step-00000005").exists()
