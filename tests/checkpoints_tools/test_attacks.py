"""Checkpoints made to harm: no code in them runs, no file outside of them is touched."""

import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from benchmarks.ranks import run_ranks
from checkpoints_tools.averaging import average_checkpoints
from checkpoints_tools.difference import diff_checkpoints
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.inspection import inspect_checkpoint
from checkpoints_tools.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    file_entry,
    manifest_text,
    model_of,
    read_manifest,
)
from checkpoints_tools.old_format import MAX_METADATA_BYTES, METADATA
from checkpoints_tools.tensor_index import INDEX, MAX_INDEX_BYTES
from checkpoints_tools.verify import verify_checkpoint
from pretrain.config import Config
from tests.checkpoints_tools.test_old_format import ARCHIVE
from tests.checkpoints_tools.test_pieces import Attack
from tests.tiny import tiny_config

STEP = "step-00000003"
NAME = "weight.model.layers.0.ssd.x_proj.weight"


def old_checkpoint(folder: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / STEP


def sign(step_dir: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Write a manifest that fits the files, as an attacker can."""
    manifest = json.loads((step_dir / MANIFEST).read_text())
    del manifest["xxh64"]
    for name in manifest["files"]:
        manifest["files"][name] = file_entry(step_dir / name)
    change(manifest)
    (step_dir / MANIFEST).write_text(manifest_text(manifest))


def load(config: Config, step_dir: Path, weights_only: bool) -> str:
    """Load on every rank; the error."""
    from benchmarks.trainers import open_trainer
    from checkpoints_tools import sharded

    trainer = open_trainer(config)
    read = sharded.load_stored_weights if weights_only else sharded.load_checkpoint
    with pytest.raises(CheckpointError) as caught:
        read(step_dir, trainer.zero)
    return str(caught.value)


@pytest.mark.parametrize("crafted", ["code", "bytes"])
def test_crafted_metadata_runs_nothing_anywhere(
    crafted: str, tiny_data: Path, tmp_path: Path
) -> None:
    sound, step_dir = old_checkpoint(tmp_path / "sound"), old_checkpoint(tmp_path / "crafted")
    ran = tmp_path / "ran"
    metadata: Any = dcp.FileSystemReader(step_dir).read_metadata()
    if crafted == "code":
        metadata.planner_data = Attack(ran)
    else:  # legitimate classes: torch's planner would unpickle the weight's bytes
        metadata.state_dict_metadata[NAME] = BytesStorageMetadata()
        (place,) = [p for i, p in metadata.storage_data.items() if i.fqn == NAME][:1]
        content = pickle.dumps(Attack(ran))
        with (step_dir / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            file.write(content)
    (step_dir / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(step_dir)
    read_manifest(step_dir)
    for act in (
        lambda: inspect_checkpoint(step_dir),
        lambda: export_checkpoint(step_dir, tmp_path / "out"),
        lambda: average_checkpoints([sound, step_dir], tmp_path / "out"),
        lambda: diff_checkpoints(sound, step_dir),
    ):
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            act()
    for deep in (False, True):
        assert verify_checkpoint(step_dir, deep=deep)[1][0].file == ".metadata"
    model = read_manifest(sound)["config"]["model"]
    config = tiny_config(tiny_data, tmp_path / "run", model=model)
    for weights_only in (True, False):
        for error in run_ranks(2, load, config, step_dir, weights_only):
            assert ".metadata" in error
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "a/b", "x\nb", "..", "\x1b[31m"])
def test_a_manifest_names_files_of_its_folder(name: str, tmp_path: Path) -> None:
    step_dir = old_checkpoint(tmp_path)
    sign(step_dir, lambda m: m["files"].update({name: {"bytes": 0, "xxh64": ""}}))
    with pytest.raises(CheckpointError, match=r"the file name|names a folder"):
        read_manifest(step_dir)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "tokenizer.json", ".metadata", MANIFEST])
def test_links_in_place_of_files_are_not_followed(name: str, target: str, tmp_path: Path) -> None:
    step_dir = old_checkpoint(tmp_path)
    (step_dir / name).unlink()
    (step_dir / name).symlink_to(target)
    with pytest.raises(CheckpointError, match="link"):
        read_manifest(step_dir)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "3"), ("step", -3), ("tokens", None), ("config", []), ("config", {}),
        ("files", {"tokenizer.json": {"bytes": "1", "xxh64": ""}}), ("samples", 10**30),
        ("judge", {"losses": "x"}), ("skipped_windows", [[1]]), ("eod_id", [1]), ("eod_id", -5),
        ("eod_id", 10**9), ("pad_id", 10**9), ("saved_at", 5), ("git_revision", ["x"]),
        ("layout", {"tensor": "x"}), ("layout", {"context": 0}), ("layout", None),
        ("averaged", 1), ("imported", []),
    ],
)  # fmt: skip
def test_wrong_types_in_a_manifest_are_one_sentence(field: str, value: Any, tmp_path: Path) -> None:
    step_dir = old_checkpoint(tmp_path)
    sign(step_dir, lambda m: m.update({field: value}))
    with pytest.raises(CheckpointError, match=rf"describes no checkpoint: {field}"):
        read_manifest(step_dir)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**7), ("num_layers", 2**60), ("num_layers", 10**30), ("vocab_size", 1.5),
        ("num_heads", "4"), ("num_kv_heads", 3), ("rope", []), ("rope_theta", float("nan")),
        ("rope_scaling", [1]), ("rope_scaling", {"rope_type": {}}), ("tie_word_embeddings", None),
        ("attn_layer_period", 0), ("head_dim", True), ("max_position_embeddings", -1),
    ],
)  # fmt: skip
def test_a_manifest_s_model_is_one_that_can_be_configured(
    field: str, value: Any, tmp_path: Path
) -> None:
    step_dir = old_checkpoint(tmp_path)
    sign(step_dir, lambda m: m["config"]["model"].update({field: value}))
    for read in (read_manifest, inspect_checkpoint, lambda d: export_checkpoint(d, tmp_path / "o")):
        with pytest.raises(
            CheckpointError, match=rf"no checkpoint: config\.model.*{field}"
        ) as caught:
            read(step_dir)
        assert str(caught.value).isprintable()


def test_models_of_other_versions_are_read(tmp_path: Path) -> None:
    """A field that this version does not know is passed over; one that it knows has a default."""
    step_dir = old_checkpoint(tmp_path)
    sign(step_dir, lambda m: m["config"]["model"].update(retired=[1]))
    assert inspect_checkpoint(step_dir)["step"] == 3
    sign(step_dir, lambda m: m["config"]["model"].pop("init_std"))
    assert model_of(read_manifest(step_dir)).init_std == 0.02


@pytest.mark.parametrize(
    ("name", "most"),
    [(MANIFEST, MAX_MANIFEST_BYTES), (INDEX, MAX_INDEX_BYTES), (METADATA, MAX_METADATA_BYTES)],
)
def test_files_larger_than_any_run_s_are_not_parsed(name: str, most: int, tmp_path: Path) -> None:
    assert most <= 1 << 28
    step_dir = old_checkpoint(tmp_path)
    with (step_dir / name).open("r+b" if name != INDEX else "wb") as file:
        file.truncate(most + 1)
    if name != MANIFEST:
        entry = file_entry(step_dir / name)
        sign(step_dir, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(CheckpointError, match=rf"{name} is larger than"):
        inspect_checkpoint(step_dir)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0\xff", b"[" * 100_000, b'{"a": 1}'])
def test_a_damaged_manifest_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).isprintable()


def test_huge_sizes_are_refused_before_they_are_allocated(tmp_path: Path) -> None:
    from checkpoints_tools.stored import StoredTensors

    size = 2**50
    entry = {"dtype": "F32", "shape": [size], "pieces": [[0, 0, 0, size]]}
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / INDEX).write_text(json.dumps({"files": ["f"], "tensors": {"t": entry}}))
    with pytest.raises(
        CheckpointError, match=r"f has 1 bytes, tensors\.json uses 4503599627370496"
    ):
        StoredTensors(tmp_path, {"f", INDEX})
