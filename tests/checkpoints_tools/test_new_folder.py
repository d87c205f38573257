"""Folders that appear whole: what is in the way, what killed commands left, and who else writes."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import new_folder as module
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.new_folder import new_folder
from untrusted import private


def write(out: Path, num_bytes: int = 1) -> None:
    with new_folder(out, num_bytes) as content:
        assert not any(content.iterdir())
        (content / "file").write_text("whole")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    yield
    os.umask(old)


def killed(out: Path) -> None:
    with new_folder(out, 1) as content:
        (content / "part").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(out: Path) -> None:
    process = get_context("fork").Process(target=killed, args=(out,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out.with_name(f".{out.name}.unfinished") / "content/part").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_it_appears_whole_and_as_the_umask_wants(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        write(tmp_path / "deep/out")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep/out/file").read_text() == "whole"
    assert (tmp_path / "deep/out").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("name", ["out", "n" * 250, "ü" * 120])
def test_what_a_killed_command_left_is_removed(name: str, tmp_path: Path) -> None:
    process = get_context("fork").Process(target=killed, args=(tmp_path / name,))
    process.start()
    process.join()
    assert len(list(tmp_path.iterdir())) == 1
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["file"]


def test_two_commands_do_not_share_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", 1) as content:
        (content / "mine").write_text("")
        with pytest.raises(CheckpointError, match="another command is writing"):
            write(tmp_path / "out")
        write(tmp_path / "other")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    def race() -> None:
        with new_folder(tmp_path / "out", 1):
            (tmp_path / "out").mkdir()
            (tmp_path / "out/other").write_text("")

    with pytest.raises(CheckpointError, match="exists and is not empty"):
        race()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "other"]


def a_file(place: Path, elsewhere: Path) -> None:
    place.write_text("")


def a_link(place: Path, elsewhere: Path) -> None:
    place.symlink_to(elsewhere)


def a_folder_with_other_things(place: Path, elsewhere: Path) -> None:
    place.mkdir()
    (place / "content").mkdir()
    (place / "other").write_text("")


def a_linked_lock(place: Path, elsewhere: Path) -> None:
    place.mkdir()
    (place / ".transxssm-unfinished").symlink_to(elsewhere / "new")


def linked_content(place: Path, elsewhere: Path) -> None:
    place.mkdir()
    (place / ".transxssm-unfinished").write_text("")
    (place / "content").symlink_to(elsewhere)


@pytest.mark.parametrize(
    "put", [a_file, a_link, a_folder_with_other_things, a_linked_lock, linked_content]
)
def test_what_is_not_ours_is_not_removed(put: Callable[[Path, Path], None], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "content").mkdir()
    (elsewhere / "content/precious").write_text("")
    (tmp_path / "here").mkdir()
    put(tmp_path / "here/.out.unfinished", elsewhere)
    with pytest.raises(CheckpointError, match=r"\.out\.unfinished"):
        write(tmp_path / "here/out")
    assert (elsewhere / "content/precious").exists()
    assert [path.name for path in elsewhere.iterdir()] == ["content"]
    assert not (tmp_path / "here/out").exists()


def test_folders_of_other_users_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_while_writing(tmp_path / "out")
    monkeypatch.setattr(module.os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(private, "_owner_of_new_files", lambda *_: None)
    with pytest.raises(CheckpointError, match="belongs to the user"):
        write(tmp_path / "out")
    assert (tmp_path / ".out.unfinished/content/part").exists()


def test_empty_folders_and_links_to_them_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target/file").exists()


def test_what_exists_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(module.os.path, "ismount", lambda path: path.name == "mounted")
    for name, found in (
        ("file", "exists and is not empty"),
        ("full", "exists and is not empty"),
        ("dangling", "a link to nothing"),
        ("mounted", "a mount point"),
        ("file/below", "failed: .*exists: .*/file"),
        ("new/..", "exists and is not empty"),
    ):
        with pytest.raises(CheckpointError, match=found):
            write(tmp_path / name)
    assert not list(tmp_path.glob(".*"))


def test_failures_leave_nothing(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        with new_folder(tmp_path / "out", 1) as content:
            (content / "part").write_text("")
            raise error

    with pytest.raises(CheckpointError, match=r"No space left on device.*nothing is left there"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(CheckpointError, match=r"needs 1,048,576,000,000.0 MiB"):
        write(tmp_path / "out", 2**20 * 1_048_576_000_000)
    assert not list(tmp_path.iterdir())


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    kill_while_writing(tmp_path / "out")
    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with pytest.raises(CheckpointError, match="has no locks"):
        write(tmp_path / "out")
    assert (tmp_path / ".out.unfinished/content/part").exists()
    write(tmp_path / "other")
    assert (tmp_path / "other/file").exists()
