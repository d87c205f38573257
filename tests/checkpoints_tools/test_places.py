"""An index, a header and a manifest that belong together: what is read is what was saved there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from checkpoints_tools.averaging import average_checkpoints
from checkpoints_tools.difference import diff_checkpoints
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.manifest import DIGEST, MANIFEST, manifest_text, read_manifest
from checkpoints_tools.tensor_index import INDEX
from checkpoints_tools.verify import verify_checkpoint
from pretrain.config import load_config
from tests.checkpoints_tools.test_attacks import load, sign

FILE = "rank-00001.safetensors"


def place_elsewhere(step_dir: Path) -> None:
    index = json.loads((step_dir / INDEX).read_text())
    for entry in index["tensors"].values():
        for piece in entry["pieces"]:
            piece[1] = 4096
    (step_dir / INDEX).write_text(json.dumps(index))


def claim_long_header(step_dir: Path) -> None:
    content = bytearray((step_dir / FILE).read_bytes())
    content[:8] = (2**63).to_bytes(8, "little")
    (step_dir / FILE).write_bytes(content)


def change_header(step_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = (step_dir / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(next(entry for name, entry in header.items() if name.startswith("weight.")))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (step_dir / FILE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "places": place_elsewhere,
    "length": claim_long_header,
    "dtype": lambda step_dir: change_header(step_dir, lambda entry: entry.update(dtype="I32")),
    "shape": lambda step_dir: change_header(step_dir, lambda entry: entry["shape"].reverse()),
    "offsets": lambda step_dir: change_header(
        step_dir, lambda entry: entry.update(data_offsets=[4, 8])
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_are_where_header_and_index_agree(
    damage: str, trained: Path, steps: Path, tmp_path: Path
) -> None:
    step_dir = steps / "step-00000004"
    DAMAGES[damage](step_dir)
    sign(step_dir)
    for deep in (False, True):
        assert verify_checkpoint(step_dir, deep=deep)[1]
    message = r"rank-0000\d\.safetensors (does not have|has no safetensors header)"
    for action in (
        lambda: export_checkpoint(step_dir, tmp_path / "out", "fp32"),
        lambda: average_checkpoints([steps / "step-00000002", step_dir], tmp_path / "out"),
        lambda: diff_checkpoints(steps / "step-00000002", step_dir),
    ):
        with pytest.raises(CheckpointError, match=message):
            action()
        assert not (tmp_path / "out").exists()
    if damage in ("places", "dtype"):
        config = load_config(trained / "config.toml")
        for error in run_ranks(2, load, config, step_dir, False):
            assert "rank-0000" in error


@pytest.mark.parametrize("missing", [INDEX, FILE])
def test_a_file_without_checksum_is_not_read(
    missing: str, trained: Path, steps: Path, tmp_path: Path
) -> None:
    step_dir = steps / "step-00000004"
    sign(step_dir, lambda manifest: manifest["files"].pop(missing))
    assert verify_checkpoint(step_dir, deep=False)[1]
    for action in (
        lambda: export_checkpoint(step_dir, tmp_path / "out", "fp32"),
        lambda: diff_checkpoints(step_dir, step_dir),
    ):
        with pytest.raises(CheckpointError, match=f"{missing} is not listed"):
            action()
    config = load_config(trained / "config.toml")
    assert "is not listed" in run_ranks(2, load, config, step_dir, False)[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unwritten_metrics", {"step": "a", "loss": [1]}),
        ("unwritten_metrics", {"step": 4, "loss": 1.0}),
        ("unwritten_metrics", {"loss": 1.0}),
        ("skipped_shards", [[{}, {}]]),
        ("skipped_shards", [["a", "b"]]),
        ("git_revision", "\ud800x"),
    ],
    ids=repr,
)
def test_state_of_another_kind_is_refused(field: str, value: Any, steps: Path) -> None:
    step_dir = steps / "step-00000004"
    manifest = json.loads((step_dir / MANIFEST).read_text())
    del manifest[DIGEST]
    metrics = {"step": 4, "loss": None, "grad_norm": float("nan"), "lr": 1e-3, "extra": 1.5}
    metrics |= {"tokens_per_second": 10.0, "memory_bytes": 1 << 40}
    manifest |= {"unwritten_metrics": metrics, "skipped_shards": [["a", 1]]}
    (step_dir / MANIFEST).write_text(manifest_text(manifest))
    assert read_manifest(step_dir)["unwritten_metrics"]["step"] == 4
    (step_dir / MANIFEST).write_text(manifest_text(manifest | {field: value}))
    with pytest.raises(CheckpointError, match=r"manifest\.json (describes no|is damaged)"):
        read_manifest(step_dir)
