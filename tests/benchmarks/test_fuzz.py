"""What benchmarks.fuzz can see, and that its damage is one."""

import json
import random
from pathlib import Path

import pytest

from benchmarks.damage import BYTES, ESCAPED, KINDS, damage_file, remove
from benchmarks.fuzz_cases import make_outside, trespass
from benchmarks.fuzz_process import Ended, fault
from benchmarks.resealing import reseal
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import file_entry, manifest_text, read_manifest


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Ended(0, b"sound\n", 1.0, 1.0, ""), ""),
        (Ended(2, b"error: refused\n", 1.0, 1.0, ""), ""),
        (Ended(2, b"", 1.0, 1.0, ""), "said nothing"),
        (Ended(-11, b"", 1.0, 1.0, ""), "SIGSEGV"),
        (Ended(3, b"x", 1.0, 1.0, ""), "ended with 3"),
        (Ended(0, b"\x1b[2J", 1.0, 1.0, ""), "control characters"),
        (Ended(0, b"\xff", 1.0, 1.0, ""), "not UTF-8"),
        (Ended(-9, b"", 60.0, 1.0, "it had not ended after 60 s"), "had not ended"),
        (Ended(1, b"Traceback (most recent call last):\n  File x\nKeyError: 3\n", 1.0, 1.0, ""),
         "KeyError: 3"),
    ],
)  # fmt: skip
def test_faults_are_seen(ended: Ended, words: str) -> None:
    assert bool(fault(ended)) == bool(words)
    assert words in fault(ended)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("home", "tmp", "work/run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "output").touch()
    return tmp_path


def test_files_outside_are_seen(folder: Path) -> None:
    outside = make_outside(folder)
    (folder / "work/run/new").touch()
    assert trespass(folder, outside, set()) == ""
    (folder / "work" / ESCAPED).touch()
    assert ESCAPED in trespass(folder, outside, set())
    (folder / "work" / ESCAPED).unlink()
    (folder / "beside").touch()
    assert "beside" in trespass(folder, outside, set())
    (folder / "beside").unlink()
    (outside / "precious").write_text("overwritten")
    assert "precious" in trespass(folder, outside, set())


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.toml", "a.safetensors", "a.bin"])
def test_damage_changes_a_file_again_and_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "a.json": b'{"a": [1, {"b": "c"}], "d": null}', "a.jsonl": b'{"a": 1}\n{"a": 2}\n',
        "a.toml": b"[a]\nb = 1\n", "a.safetensors": b'\x08\0\0\0\0\0\0\0{"a": 1}data',
    }  # fmt: skip
    content = contents.get(name, bytes(range(256)))
    path, done, changed = tmp_path / name, set(), 0
    for number in range(900):
        path.write_bytes(content)
        done.add(damage_file(path, random.Random(number), tmp_path / "outside"))
        changed += not path.is_file() or path.is_symlink() or path.read_bytes() != content
        remove(path)
    assert set(BYTES) | set(KINDS) <= done
    assert changed > 800


def test_a_resealed_checkpoint_is_believed(tmp_path: Path) -> None:
    step = tmp_path / "step-00000001"
    step.mkdir()
    (step / "part").write_text("x")
    manifest = {
        "format_version": 3, "step": 1, "files": {"part": file_entry(step / "part")},
        "config": {"model": {}}, "tokens": 0, "samples": 0, "adam_step": 0, "world_size": 1,
        "data_fingerprint": "", "tokenizer_hash": "", "eod_id": 0, "pad_id": 1,
    }  # fmt: skip
    (step / "manifest.json").write_text(manifest_text(manifest))
    (step / "part").write_text("damaged")
    with pytest.raises(CheckpointError, match="7 bytes, not 1"):
        read_manifest(step)
    reseal(step / "part")
    assert read_manifest(step)["files"]["part"]["bytes"] == 7
    changed = json.loads((step / "manifest.json").read_text()) | {"tokens": 10**21}
    (step / "manifest.json").write_text(json.dumps(changed))
    reseal(step / "manifest.json")
    with pytest.raises(CheckpointError, match="describes no checkpoint: tokens"):
        read_manifest(step)
