"""Only regular files are opened, and nothing blocks; private folders are the user's own."""

import errno
import os
from pathlib import Path

import pytest

from untrusted.errors import UnsafeFileError
from untrusted.files import open_regular, read_regular, write_durably
from untrusted.private import private_folder


def test_devices_pipes_folders_and_links_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path, kind in (
        (Path("/dev/zero"), "a device"),
        (tmp_path / "pipe", "a pipe"),
        (tmp_path, "a folder"),
        (tmp_path / "link", "a link"),
    ):
        with pytest.raises(UnsafeFileError, match=kind):
            open_regular(path)
    with pytest.raises(UnsafeFileError, match="a device"):
        open_regular(tmp_path / "zero", follow_link=True)
    assert read_regular(tmp_path / "link", 7, follow_link=True) == b"content"
    with pytest.raises(UnsafeFileError, match="larger than 6 bytes"):
        read_regular(tmp_path / "file", 6)


def test_a_private_folder_is_made_and_found_again(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "cache")
    assert folder == tmp_path / "cache" == private_folder(tmp_path / "cache")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)  # as earlier versions made it
    assert private_folder(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("fault", ["link", "foreign", "open", "file"])
def test_a_folder_that_is_not_ours_is_left_alone(fault: str, tmp_path: Path) -> None:
    path, victim = tmp_path / "cache", tmp_path / "victim"
    victim.mkdir()
    if fault == "link":
        path.symlink_to(victim)
    elif fault == "file":
        path.write_text("")
    else:
        path.mkdir()
        path.chmod(0o777)
    if fault == "foreign":  # needs root, as CI has
        path.chmod(0o755)
        os.chown(path, 4242, 4242)
    before = path.lstat()
    assert private_folder(path) == private_folder(path) == tmp_path / "cache.1"
    assert (path.lstat().st_mode, path.lstat().st_uid) == (before.st_mode, before.st_uid)
    for number in range(1, 4):
        folder = tmp_path / f"cache.{number}"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    last = private_folder(path)
    assert last.name.startswith("cache.")
    assert last.stat().st_mode & 0o777 == 0o700


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match=r"No space left.*/file'"):
        write_durably(path, b"after")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"
