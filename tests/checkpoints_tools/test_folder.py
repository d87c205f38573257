"""Committing a checkpoint: whenever it is cut off, `latest` names a whole one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import file_entry, read_manifest
from checkpoints_tools.pieces_file import write_pieces
from untrusted.files import write_durably

MANIFEST = {
    "config": {"model": {}}, "tokens": 0, "samples": 0, "adam_step": 0, "world_size": 1,
    "data_fingerprint": "", "tokenizer_hash": "", "eod_id": 0, "pad_id": 1,
}  # fmt: skip
NO_LATEST: dict[str, Callable[[Path], None]] = {
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "noise": lambda path: path.write_bytes(b"\xff\xfe") and None,
    "large": lambda path: path.write_text("step-00000001" * 1000) and None,
}
CALLS = ("rename", "replace", "fsync", "unlink", "rmdir")


class CutOffError(BaseException):
    """The process is gone: nothing handles it."""


def cut_off_at(number: int, monkeypatch: pytest.MonkeyPatch, done: list[str]) -> None:
    """End at the call number `number` of those that change names or wait for the disk."""
    for name in CALLS:
        original: Callable[..., Any] = getattr(os, name)

        def call(*words: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            if len(done) == number:
                raise CutOffError
            done.append(_name)
            return _original(*words, **more)

        monkeypatch.setattr(os, name, call)


def save(folder: Path, step: int, content: str) -> None:
    temporary = folders.begin(folder, step)
    (temporary / "part").write_text(content)
    folders.commit(folder, step, MANIFEST | {"content": content})


def whole(step_dir: Path) -> str:
    """What a checkpoint holds; it must be complete."""
    content = (step_dir / "part").read_text()
    assert read_manifest(step_dir)["content"] == content
    return content


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step saved again"])
def test_a_commit_that_is_cut_off_anywhere_leaves_latest_whole(again: bool, tmp_path: Path) -> None:
    number, seen, ended = 0, [], False
    while not ended:
        folder = tmp_path / str(number)
        save(folder, 1, "one")
        save(folder, 2, "two")
        step = 2 if again else 3
        done: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            cut_off_at(number, patch, done)
            try:
                save(folder, step, "new")
                ended = True
            except CutOffError:
                pass
        named = folder / (folder / "latest").read_text().strip()
        # a step that is saved again may be set aside for a moment: the next start brings it back
        set_aside = again and not named.exists()
        folders.remove_temporary(folder)
        seen.append(f"{whole(named)}{' (set aside)' if set_aside else ''}")
        assert whole(folders.resolve(folder)) in ("two", "new")
        assert {path.name for path in folder.iterdir() if path.suffix != ".tmp"} == {
            "latest", *(f"step-{n:08d}" for n in folders.committed_steps(folder)),
        }  # fmt: skip
        number += 1
    assert number > 5
    assert seen[0] == "two"
    assert seen[-1] == "new"
    assert seen == sorted(seen, key=lambda text: text.startswith("new"))  # never back
    assert sum("aside" in text for text in seen) <= 1


def test_going_back_that_is_cut_off_anywhere_leaves_what_to_go_back_to(tmp_path: Path) -> None:
    """Damaged and unfinished checkpoints being there, too."""
    number, ended, newest = 0, False, []
    while not ended:
        folder = tmp_path / str(number)
        for step in (2, 4, 6, 8):
            save(folder, step, "one")
        (folder / "step-00000008.tmp").mkdir()
        start = folders.step_folder(folder, 2)  # that of step 4 is damaged
        with pytest.MonkeyPatch.context() as patch:
            cut_off_at(number, patch, [])
            try:
                folders.go_back_to(folder, start, 4)
                ended = True
            except CutOffError:
                pass
        folders.remove_temporary(folder)  # as the next start does
        steps = folders.committed_steps(folder)
        assert steps[:2] == [2, 4]
        assert all(whole(folders.step_folder(folder, step)) == "one" for step in steps)
        assert folders.resolve(folder) in {folders.step_folder(folder, step) for step in (2, 8)}
        newest.append(steps[-1])
        number += 1
    assert number > 5
    assert newest[0] == 8
    assert newest[-1] == 4
    assert newest == sorted(newest, reverse=True)
    assert folders.resolve(folder) == start
    folders.go_back_to(folder, start, 4)  # nothing is left to do
    assert {path.name for path in folder.iterdir()} == {
        "latest", "step-00000002", "step-00000004",
    }  # fmt: skip


def test_checkpoint_from_before_bad_steps_outlives_retention(tmp_path: Path) -> None:
    for step in (2, 4, 7, 8):
        save(tmp_path, step, "one")
    folders.remove_old(tmp_path, 8, keep_last=1, keep_every=0, keep_up_to=5)
    assert folders.committed_steps(tmp_path) == [4, 8]
    folders.remove_old(tmp_path, 8, keep_last=1, keep_every=0)
    assert folders.committed_steps(tmp_path) == [8]


def test_latest_moves_after_the_step_has_its_name_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the machine loses what was not waited for: renames in order, a folder's sync after
    each, and every file's content on disk before its folder gets its name."""
    save(tmp_path, 1, "one")
    temporary = folders.begin(tmp_path, 2)
    (temporary / "part").write_text("two")
    log: list[tuple[str, str]] = []
    rename, fsync = os.rename, os.fsync

    def noted_rename(old: Any, new: Any, **more: Any) -> None:
        log.append(("rename", Path(new).name))
        rename(old, new, **more)

    def noted_fsync(descriptor: int) -> None:
        log.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    folders.commit(tmp_path, 2, {})
    step, latest = ("rename", "step-00000002"), ("rename", "latest")
    assert {("sync", ".manifest.json.tmp"), ("sync", temporary.name)} <= set(log[: log.index(step)])
    between = log[log.index(step) : log.index(latest)]
    assert ("sync", tmp_path.name) in between
    assert ("sync", ".latest.tmp") in between
    assert ("sync", tmp_path.name) in log[log.index(latest) :]


@pytest.mark.parametrize("left", ["step-00000001.tmp", "step-00000002.tmp", ".latest.tmp"])
def test_links_in_the_place_of_what_is_written_are_replaced(left: str, tmp_path: Path) -> None:
    outside, checkpoints = tmp_path / "outside", tmp_path / "checkpoints"
    outside.mkdir()
    (outside / "file").write_text("kept")
    checkpoints.mkdir()
    target = outside / "file" if left == ".latest.tmp" else outside
    (checkpoints / left).symlink_to(target)
    save(checkpoints, 2, "two")
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "kept"
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "step-00000002"}
    assert not (checkpoints / "latest").is_symlink()


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "rank-00000.safetensors"])
def test_links_within_a_step_are_replaced(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("kept")
    temporary = folders.begin(tmp_path, 1)
    (temporary / name).symlink_to(outside)
    if name == "tokenizer.json":
        write_durably(temporary / name, b"{}")
    elif name != "manifest.json":
        write_pieces(temporary / name, b"", [torch.ones(2)])
    assert read_manifest(folders.commit(tmp_path, 1, MANIFEST))["step"] == 1
    assert outside.read_text() == "kept"


def test_a_file_is_summed_a_block_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part").write_bytes(bytes(range(256)) * 10)
    whole = file_entry(tmp_path / "part")
    monkeypatch.setattr("checkpoints_tools.manifest.BLOCK", 100)
    assert file_entry(tmp_path / "part") == whole
    assert whole["bytes"] == 2560


@pytest.mark.parametrize("make", NO_LATEST.values(), ids=NO_LATEST)
def test_without_a_usable_latest_the_newest_step_is_taken(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    for step in (1, 2):
        save(tmp_path, step, "x")
    (tmp_path / "latest").unlink()
    make(tmp_path / "latest")
    assert folders.resolve(tmp_path) == tmp_path / "step-00000002"


def test_run_whose_checkpoints_lie_elsewhere_means_those(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `checkpoint.dir` says where, which the run has recorded."""
    run, saves = tmp_path / "run", tmp_path / "saves"
    (saves / "step-00000004").mkdir(parents=True)
    run.mkdir()
    (run / folders.SAVES_FILE).write_text(f'{{"folder": "{saves}", "step": 4}}')
    assert folders.resolve(run) == saves / "step-00000004"
    (run / folders.SAVES_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="run is not a checkpoint"):
        folders.resolve(run)
    assert f"{folders.SAVES_FILE} is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        folders.resolve(run / folders.SAVES_FILE)
