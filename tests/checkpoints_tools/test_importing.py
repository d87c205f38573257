"""Single-GPU models made into checkpoints, and means of checkpoints."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoint_layouts import stored_tensors
from checkpoints_tools import averaging, fresh, source, stored
from checkpoints_tools.averaging import average_checkpoints
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.importing import import_model
from checkpoints_tools.manifest import MANIFEST, manifest_text, read_manifest
from checkpoints_tools.verify import verify_checkpoint
from tests.pretrain.command import paragraph, read_metrics, run_command, succeed

FIRST = "step-00000000"


def snapshot(model: Path) -> dict[str, bytes]:
    """Every file but the card, which says where the weights come from."""
    return {p.name: p.read_bytes() for p in model.iterdir() if p.name != "README.md"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_export_import_export_is_bit_for_bit(dtype: str, trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "run", tmp_path / "a", dtype, max_shard_bytes=30_000)
    step_dir = import_model(tmp_path / "a", tmp_path / "imported", {})
    assert step_dir == tmp_path / "imported" / FIRST
    assert verify_checkpoint(step_dir, deep=True) == (step_dir, [])
    export_checkpoint(tmp_path / "imported", tmp_path / "b", dtype, max_shard_bytes=30_000)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    state = read_manifest(step_dir)
    original = read_manifest(trained / "run/checkpoints/step-00000004")
    assert [state[n] for n in ("step", "samples", "tokens", "adam_step")] == [0, 0, 0, 0]
    for name in ("tokenizer_hash", "eod_id", "pad_id"):
        assert state[name] == original[name]
    length = {"max_position_embeddings": original["longest_sequence"]}
    assert state["config"]["model"] == original["config"]["model"] | length
    tensors = stored_tensors(step_dir)
    expected = stored_tensors(trained / "run/checkpoints/step-00000004")
    for name, tensor in tensors.items():
        if name.startswith("exp_avg"):
            assert not tensor.any()
        elif dtype == "fp32":
            assert torch.equal(tensor, expected[name])


def test_run_starts_from_an_imported_model(trained: Path, tmp_path: Path) -> None:
    succeed("checkpoint", "export", trained / "run", tmp_path / "model")
    config, target = trained / "config.toml", tmp_path / "imported"
    succeed("checkpoint", "import", tmp_path / "model", target, "--config", config)
    state = read_manifest(target / FIRST)
    of_run = read_manifest(trained / "run/checkpoints/step-00000004")
    assert state["data_fingerprint"] == of_run["data_fingerprint"]
    succeed("checkpoint", "export", target, tmp_path / "again", "--no-verify")
    card = (tmp_path / "again/README.md").read_text()  # the data is that of a run to come
    assert "| training data | not recorded |" in card
    assert "| data fingerprint | not recorded |" in card
    words = ["--logging.run_dir", tmp_path / "run", "--parallel.tensor", "1"]
    words += ["--checkpoint.resume", target, "--training.steps", "2"]
    (end,) = run_command("pretrain", config, *words)
    assert end.code == 0, end.output
    steps = read_metrics(tmp_path / "run")
    assert [entry["step"] for entry in steps] == [1, 2]
    before = read_metrics(trained / "run")
    # trained weights, not new ones: the first loss is below that of the run it comes from
    assert steps[0]["loss"] < before[0]["loss"] - 0.01


def unknown_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.word_embed.weight"].clone()
    save_file(tensors, model / "model.safetensors")


def missing_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.ssd.A_log"]
    save_file(tensors, model / "model.safetensors")


def other_shape(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 300}))


def cut_file(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def odd_groups(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ssd_chunk_size": 100}))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (unknown_tensor, "without a place in the model: lm_head.weight"),
        (missing_tensor, "parameters without a tensor: model.layers.0.ssd.A_log"),
        (other_shape, r"word_embed.weight has shape \[301, 32\], the model wants \[300, 32\]"),
        (cut_file, "model.safetensors has"),
        (no_weights, "model.safetensors"),
        (no_tokenizer, "has no tokenizer.json"),
        (no_config, "config.json cannot be read"),
        (odd_groups, "model.chunk_size=100 is not a power of two"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_folder_that_is_no_whole_model_is_refused(
    damage: Callable[[Path], None], found: str, trained: Path, tmp_path: Path
) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=found):
        import_model(tmp_path / "model", tmp_path / "imported", {})
    assert not (tmp_path / "imported").exists()


def test_other_model_in_the_configuration_is_refused(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    model = read_manifest(trained / "run/checkpoints/step-00000004")["config"]["model"]
    wrong = model | {"num_layers": 6, "rope_theta": 500.0}
    with pytest.raises(CheckpointError, match=r"model.num_layers: 4 there, 6.*rope_theta: 10000"):
        import_model(tmp_path / "model", tmp_path / "imported", {"model": wrong})
    import_model(tmp_path / "model", tmp_path / "imported", {"model": model | {"chunk_size": 64}})
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        import_model(tmp_path / "model", tmp_path / "imported", {"model": model})
    vocabulary = json.loads((tmp_path / "model/tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["new"] = 300
    with pytest.raises(CheckpointError, match=r"another tokenizer .*differ in model\)"):
        import_model(
            tmp_path / "model", tmp_path / "x", {}, tokenizer=json.dumps(vocabulary).encode()
        )


def test_failure_while_writing_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    export_checkpoint(trained / "run", tmp_path / "model")
    monkeypatch.setattr(fresh, "write_untrained_state", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        import_model(tmp_path / "model", tmp_path / "imported", {})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def killed_while_committing() -> None:
    def commit(*_: Any) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    fresh.folders.commit = commit


def test_killed_commands_can_be_run_again(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained / "run", tmp_path / "model")
    steps = [trained / f"run/checkpoints/step-0000000{n}" for n in (2, 4)]
    for words in (
        ["import", tmp_path / "model", tmp_path / "out/imported"],
        ["average", *steps, "--out", tmp_path / "out/average"],
    ):
        (end,) = run_command("checkpoint", *words, before=killed_while_committing)
        assert end.code == -signal.SIGKILL
        succeed("checkpoint", *words)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["average", "imported"]
    for name in ("average", "imported"):
        step_dir = tmp_path / "out" / name / FIRST
        assert verify_checkpoint(step_dir, deep=True) == (step_dir, [])


# -- averages --------------------------------------------------------------------------------------


def test_average_is_the_mean_of_the_weights(trained: Path, tmp_path: Path) -> None:
    steps = [trained / f"run/checkpoints/step-0000000{n}" for n in (2, 4)]
    step_dir = average_checkpoints(steps, tmp_path / "average")
    assert verify_checkpoint(step_dir, deep=True) == (step_dir, [])
    first, second, mean = (stored_tensors(path) for path in (*steps, step_dir))
    assert mean.keys() == first.keys()
    for name, tensor in mean.items():
        if name.startswith("weight."):
            exact = (first[name].double() + second[name].double()) / 2
            assert torch.equal(tensor, exact.float()), name
        else:
            assert not tensor.any()
    state = read_manifest(step_dir)
    assert [entry["step"] for entry in state["averaged"]] == [2, 4]
    assert [entry["checkpoint"] for entry in state["averaged"]] == [str(path) for path in steps]
    export_checkpoint(step_dir, tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert "step 2 (" in card
    assert "step 4 (" in card


def test_average_has_the_configuration_of_the_longest(trained: Path, tmp_path: Path) -> None:
    first, last = (trained / f"run/checkpoints/step-0000000{n}" for n in (2, 4))
    copy = Path(shutil.copytree(first, tmp_path / first.name))
    manifest = read_manifest(copy)
    manifest["config"]["training"]["seed"] += 1
    (copy / MANIFEST).write_text(manifest_text(manifest))
    for order in ([copy, last], [last, copy]):
        step_dir = average_checkpoints(order, tmp_path / f"average of {order[0].name}")
        assert read_manifest(step_dir)["config"] == read_manifest(last)["config"]


def test_average_with_an_import_of_the_same_model(trained: Path, tmp_path: Path) -> None:
    step_dir = trained / "run/checkpoints/step-00000004"
    export_checkpoint(step_dir, tmp_path / "model")
    other = import_model(tmp_path / "model", tmp_path / "other", {})
    average = average_checkpoints([step_dir, other], tmp_path / "average")
    assert read_manifest(average)["config"] == read_manifest(step_dir)["config"]


def test_average_of_different_models_is_refused(trained: Path, tmp_path: Path) -> None:
    step_dir = trained / "run/checkpoints/step-00000004"
    export_checkpoint(step_dir, tmp_path / "model")
    model = read_manifest(step_dir)["config"]["model"]
    other = import_model(
        tmp_path / "model", tmp_path / "other", {"model": model | {"chunk_size": 64}}
    )
    words = ["checkpoint", "average", step_dir, other, "--out", tmp_path / "average"]
    (end,) = run_command(*words)
    assert end.code == 1
    assert "different models (model.chunk_size: 0 and 64)" in paragraph(end.output)
    for paths, found in (([step_dir], "two checkpoints or more"), ([step_dir] * 2, "named twice")):
        with pytest.raises(CheckpointError, match=found):
            average_checkpoints(paths, tmp_path / "average")
    shutil.rmtree(tmp_path / "model")
    assert not (tmp_path / "average").exists()


def test_average_leaves_out_credentials_of_older_records(steps: Path, tmp_path: Path) -> None:
    """Manifests once had the URLs whole."""
    step_dir = steps / "step-00000004"
    manifest = read_manifest(step_dir)
    manifest["config"]["data"]["validation"] = "s3://user:planted-secret@host/data"
    (step_dir / MANIFEST).write_text(manifest_text(manifest))
    average_checkpoints([step_dir, steps / "step-00000002"], tmp_path / "average")
    written = (tmp_path / "average" / FIRST / MANIFEST).read_text()
    assert "s3://***@host/data" in written
    assert "planted-secret" not in written


@pytest.mark.parametrize(
    ("place", "name"),
    [(source, "read_manifest"), (source, "damaged_files"), (source, "StoredTensors"),
     (stored, "open_regular"), (averaging, "read_tokenizer")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_average_of_a_checkpoint_that_is_removed_meanwhile(
    place: ModuleType, name: str, steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run with checkpoint.keep_last does: it renames the folder, then removes it."""
    whole = getattr(place, name)

    def removed_first(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(steps / "step-00000004", ignore_errors=True)
        return whole(*arguments, **options)

    monkeypatch.setattr(place, name, removed_first)
    paths = [steps / "step-00000004", steps / "step-00000002"]
    with pytest.raises(CheckpointError, match="step-00000004"):
        average_checkpoints(paths, tmp_path / "average")
    assert not (tmp_path / "average").exists()
