"""Listing, inspecting, verifying and comparing checkpoints; damage of every kind is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkpoint_layouts import stored_tensors
from checkpoints_tools import difference
from checkpoints_tools import folder as folders
from checkpoints_tools.manifest import MANIFEST, file_entry, manifest_text, read_manifest
from checkpoints_tools.tensor_index import INDEX
from checkpoints_tools.verify import verify_checkpoint
from tests.pretrain.command import paragraph, run_command

NEWEST = "step-00000004"
WIDEST = 300  # columns of what a command prints into a pipe here


def told(*words: str | Path, code: int = 0) -> Any:
    """The JSON value that a command prints."""
    (end,) = run_command("checkpoint", *words, "--json")
    assert end.code == code, end.output
    return json.loads(end.output.splitlines()[0])


# -- list and inspect ------------------------------------------------------------------------------


def test_list_shows_damaged_checkpoints_as_such(steps: Path) -> None:
    (steps / "step-00000002/rank-00001.safetensors").unlink()
    (steps / "step-00000009").mkdir()
    found = told("list", steps)
    assert [(entry["step"], entry["tokens"]) for entry in found] == [
        (2, None),
        (4, 2048),
        (9, None),
    ]
    assert "rank-00001.safetensors is missing" in found[0]["problem"]
    assert found[1]["problem"] is None
    assert "cannot read manifest.json" in found[2]["problem"]
    (end,) = run_command("checkpoint", "list", steps)
    assert end.code == 0
    assert end.output.count("damaged: ") == 2
    assert end.output.count("sizes match") == 1
    flipped_bit(steps / NEWEST)
    (end,) = run_command("checkpoint", "list", steps)
    assert end.output.count("sizes match") == 1
    assert "sound" not in end.output
    assert "`checkpoint verify --deep` reads every byte" in end.output
    assert max(map(len, end.output.splitlines())) <= WIDEST


def test_inspect_reads_metadata_alone(steps: Path) -> None:
    step_dir = steps / NEWEST
    for path in step_dir.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    found = told("inspect", steps, "--tensors")
    assert (found["step"], found["tokens"], found["samples"]) == (4, 2048, 32)
    assert found["layout"]["tensor"] == 2
    weights = {n: t for n, t in found["tensors"].items() if n.startswith("weight.")}
    assert sum(t["bytes"] for t in weights.values()) == found["bytes_by_kind"]["weight"]
    assert found["bytes_by_kind"]["weight"] == 4 * found["parameters"]
    assert weights["weight.model.word_embed.weight"]["shape"] == [301, 32]
    assert isinstance(told("inspect", steps)["tensors"], int)
    (end,) = run_command("checkpoint", "inspect", steps, "--tensors")
    assert "weight.model.word_embed.weight" in end.output
    assert "[301, 32]" in end.output
    assert "layout.tensor" in end.output
    lines = end.output.splitlines()
    fields = [line for line in lines if line.startswith(("layout.", "versions.", "model."))]
    assert [line.rstrip() for line in fields] == fields
    assert max(map(len, lines)) <= WIDEST


# -- verify ----------------------------------------------------------------------------------------


def flipped_bit(step_dir: Path) -> None:
    path = step_dir / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def swapped_files(step_dir: Path) -> None:
    one, other = (step_dir / f"rank-{rank:05d}.safetensors" for rank in (0, 1))
    one.rename(step_dir / "x")
    other.rename(one)
    (step_dir / "x").rename(other)


def swapped_files_of_one_size(step_dir: Path) -> None:
    """As above, of files that their size does not tell apart, as those of data-parallel ranks."""
    manifest = read_manifest(step_dir)
    paths = [step_dir / f"rank-{rank:05d}.safetensors" for rank in (0, 1)]
    size = max(path.stat().st_size for path in paths)
    for path in paths:
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        manifest["files"][path.name] = file_entry(path)
    (step_dir / MANIFEST).write_text(manifest_text(manifest))
    swapped_files(step_dir)


def stale_manifest(step_dir: Path) -> None:
    shutil.copyfile(step_dir.parent / "step-00000002" / MANIFEST, step_dir / MANIFEST)


def renamed_folder(step_dir: Path) -> None:
    shutil.rmtree(step_dir)
    (step_dir.parent / "step-00000002").rename(step_dir)


def edited_manifest(step_dir: Path) -> None:
    path = step_dir / MANIFEST
    path.write_text(path.read_text().replace('"tokens": 2048', '"tokens": 2049'))


def reformatted_manifest(step_dir: Path) -> None:
    path = step_dir / MANIFEST
    path.write_text(path.read_text().replace("\n", "\n "))


def no_manifest(step_dir: Path) -> None:
    (step_dir / MANIFEST).unlink()


def cut_file(step_dir: Path) -> None:
    path = step_dir / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def missing_file(step_dir: Path) -> None:
    (step_dir / "rank-00001.safetensors").unlink()


def other_tokenizer(step_dir: Path) -> None:
    path = step_dir / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))


def broken_index(step_dir: Path) -> None:
    path = step_dir / INDEX
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def stray_file(step_dir: Path) -> None:
    (step_dir / "rank-00007.safetensors").write_bytes(b"")


def committed_again(step_dir: Path, change: Callable[[Any], None]) -> None:
    """As a faulty writer would have saved it: another index, and a manifest that fits."""
    index = json.loads((step_dir / INDEX).read_text())
    change(index)
    (step_dir / INDEX).write_text(json.dumps(index))
    manifest = read_manifest_unchecked(step_dir)
    manifest["files"] = {
        path.name: file_entry(path) for path in sorted(step_dir.iterdir()) if path.name != MANIFEST
    }
    (step_dir / MANIFEST).write_text(manifest_text(manifest))


def read_manifest_unchecked(step_dir: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((step_dir / MANIFEST).read_text())
    del manifest["xxh64"]
    return manifest


NAME = "exp_avg.model.layers.1.attn.q_proj.weight"


def undescribed_tensor(step_dir: Path) -> None:
    committed_again(step_dir, lambda index: index["tensors"].pop(NAME))


def lost_piece(step_dir: Path) -> None:
    committed_again(step_dir, lambda index: index["tensors"][NAME]["pieces"].pop())


def unlisted_file(step_dir: Path) -> None:
    manifest = read_manifest_unchecked(step_dir)
    del manifest["files"]["rank-00001.safetensors"]
    (step_dir / MANIFEST).write_text(manifest_text(manifest))


def unused_file(step_dir: Path) -> None:
    (step_dir / "rank-00009.safetensors").write_bytes(b"x")
    committed_again(step_dir, lambda index: None)


@pytest.mark.parametrize(
    ("damage", "deep", "file", "what"),
    [
        (flipped_bit, True, "rank-00000.safetensors", "checksum"),
        (swapped_files, False, "rank-00000.safetensors", "bytes, not"),
        (swapped_files_of_one_size, True, "rank-00000.safetensors", "it is rank-00001.safetensors"),
        (stale_manifest, False, MANIFEST, "is of step-00000002"),
        (renamed_folder, False, MANIFEST, "is of step-00000002"),
        (edited_manifest, False, MANIFEST, "was changed after it was written"),
        (reformatted_manifest, False, MANIFEST, "not written as it was saved"),
        (cut_file, False, "rank-00001.safetensors", "bytes, not"),
        (missing_file, False, "rank-00001.safetensors", "is missing"),
        (other_tokenizer, False, "tokenizer.json", "checksum"),
        (broken_index, False, INDEX, "checksum"),
        (stray_file, False, "rank-00007.safetensors", "does not list it"),
        (undescribed_tensor, False, INDEX, f"{NAME} is missing"),
        (lost_piece, False, INDEX, "a part is missing"),
        (unlisted_file, False, "rank-00001.safetensors", "does not list it"),
        (unused_file, False, "rank-00009.safetensors", "uses nothing of it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_found_and_named(
    damage: Callable[[Path], None], deep: bool, file: str, what: str, steps: Path
) -> None:
    assert verify_checkpoint(steps, deep=True) == (steps / NEWEST, [])
    damage(steps / NEWEST)
    found = verify_checkpoint(steps / NEWEST, deep=deep)[1]
    assert any(problem.file == file and what in problem.what for problem in found), found
    if damage is flipped_bit:
        assert not verify_checkpoint(steps / NEWEST, deep=False)[1]  # what only reading shows


def test_verify_command(steps: Path) -> None:
    (end,) = run_command("checkpoint", "verify", steps, "--deep")
    assert (end.code, "every byte is as saved" in end.output) == (0, True)
    flipped_bit(steps / NEWEST)
    (end,) = run_command("checkpoint", "verify", steps)
    assert end.code == 0
    (end,) = run_command("checkpoint", "verify", steps, "--deep")
    assert end.code == 1
    assert "is damaged (rank-00000.safetensors)" in paragraph(end.output)
    found = told("verify", steps, "--deep", code=1)
    assert [problem["file"] for problem in found["problems"]] == ["rank-00000.safetensors"]
    no_manifest(steps / NEWEST)
    (end,) = run_command("checkpoint", "verify", steps / NEWEST)
    assert end.code == 1
    assert MANIFEST in paragraph(end.output)


# -- diff ------------------------------------------------------------------------------------------


def test_diff_of_two_steps(steps: Path) -> None:
    a, b = steps / "step-00000002", steps / NEWEST
    found = told("diff", a, b)
    assert found["fields"]["step"] == [2, 4]
    assert found["fields"]["samples"] == [16, 32]
    assert not any(name.startswith(("config.", "judge")) for name in found["fields"])
    first, second = stored_tensors(a), stored_tensors(b)
    entries = {entry["name"]: entry for entry in found["tensors"]}
    assert {n for n in first if not first[n].equal(second[n])} == entries.keys() - {
        "rng.0",
        "rng.1",
    }
    for name, entry in entries.items():
        if name.startswith("rng."):
            continue
        one, other = first[name].double(), second[name].double()
        norm = max(one.norm(), other.norm())
        assert entry["relative"] == pytest.approx(float((one - other).norm() / norm), rel=1e-9)
        assert entry["largest"] == pytest.approx(float((one - other).abs().max()))
        assert entry["elements"] == int((one != other).sum())
    (end,) = run_command("checkpoint", "diff", a, b, "--no-values")
    assert "and 0 of the shapes of" in end.output
    assert max(map(len, end.output.splitlines())) <= WIDEST


def test_diff_does_not_depend_on_blocks(steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, dict[str, Any]]:
        tensors = difference.diff_checkpoints(steps / "step-00000002", steps / NEWEST)["tensors"]
        return {entry.pop("name"): entry for entry in tensors}

    whole = found()
    monkeypatch.setattr("checkpoints_tools.stored.BLOCK_BYTES", 300)
    parts = found()
    assert parts.keys() == whole.keys()
    for name, entry in whole.items():
        assert parts[name] == pytest.approx(entry, rel=1e-12), name


def test_diff_finds_fields_and_shapes(steps: Path, trained: Path) -> None:
    whole = told("diff", trained / "run", steps)
    assert (whole["fields"], whole["tensors"]) == ({}, [])
    other = steps.parent / "other"
    temporary = folders.begin(other, 4)
    for path in (steps / NEWEST).iterdir():
        if path.name != MANIFEST:
            shutil.copyfile(path, temporary / path.name)
    index = json.loads((temporary / INDEX).read_text())
    del index["tensors"][NAME]
    (temporary / INDEX).write_text(json.dumps(index))
    manifest = read_manifest(steps / NEWEST)
    manifest["config"]["optimizer"]["lr"] = 0.5
    folders.commit(other, 4, {n: v for n, v in manifest.items() if n != "files"})
    found = told("diff", steps, other)
    assert found["fields"] == {"config.optimizer.lr": [0.001, 0.5]}
    assert found["tensors"] == [{"name": NAME, "problem": "only in a"}]


def test_diff_of_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan, inf = float("nan"), float("inf")
    pairs = {
        "same": ([nan, inf, 1.0], [nan, inf, 1.0]),
        "zero": ([0.0, nan], [-0.0, nan]),
        "near": ([inf, 3.0, 4.0], [inf, 3.0, 4.5]),
        "far": ([1.0], [2.0]),
        "nan": ([nan, 1.0], [1.0, 1.0]),
        "infinite": ([1.0, 1.0], [1.0, -inf]),
    }

    class Stored:
        def __init__(self, side: int) -> None:
            self.tensors = {name: torch.tensor(pair[side]) for name, pair in pairs.items()}

        def blocks(self, name: str) -> Any:
            yield range(len(self.tensors[name])), self.tensors[name]

        def rows(self, name: str, rows: range) -> torch.Tensor:
            return self.tensors[name][rows.start : rows.stop]

    a, b = tmp_path / "a", tmp_path / "b"
    manifests = {a: {"files": 1, "config": {}}, b: {"files": 2, "config": {}}}
    monkeypatch.setattr(folders, "resolve", lambda path: path)
    monkeypatch.setattr(difference, "read_manifest", manifests.get)
    monkeypatch.setattr(difference, "StoredTensors", lambda path, _: Stored(int(path == b)))
    found = json.loads(json.dumps(difference.diff_checkpoints(a, b), allow_nan=False))["tensors"]
    assert [entry["name"] for entry in found] == ["nan", "infinite", "far", "near"]
    assert [entry["problem"] for entry in found[:2]] == ["NaN in a", "infinity in b"]
    assert found[3] == {
        "name": "near", "relative": pytest.approx(0.5 / (9 + 4.5**2) ** 0.5), "largest": 0.5,
        "elements": 1,
    }  # fmt: skip
