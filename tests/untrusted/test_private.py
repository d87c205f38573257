"""Folders with predictable names: what others may have put there first."""

import os
import stat
from pathlib import Path

import pytest

from tests.conftest import missing
from untrusted.errors import UnsafeFileError
from untrusted.private import check_ours, private_folder


def plain(path: Path) -> None:
    path.write_text("")


def link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o1777)


def writable_by_its_group(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def of_another(path: Path) -> None:
    if os.geteuid():
        missing("only root can create files of other users or device files")
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)


def with_a_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.mkdir(mode=0o700)
    (path / "parts").symlink_to("../elsewhere")


@pytest.mark.parametrize(
    "planted", [plain, link, dangling, writable, writable_by_its_group, of_another, with_a_link]
)
def test_what_others_made_is_not_used(planted, tmp_path, caplog) -> None:
    path = tmp_path / "known"
    planted(path)
    assert (
        private_folder(path, ["parts"]) == private_folder(path, ["parts"]) == tmp_path / "known.1"
    )
    assert f"{path}" in caplog.text
    for folder in (tmp_path / "known.1", tmp_path / "known.1/parts"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(tmp_path.glob("elsewhere/*"))


def test_at_last_the_name_is_not_to_be_known(tmp_path, caplog) -> None:
    for name in ("known", "known.1", "known.2", "known.3"):
        (tmp_path / name).symlink_to("nowhere")
    made = private_folder(tmp_path / "known", ["parts"])
    assert made.name not in ("known", "known.1", "known.2", "known.3")
    assert (made / "parts").is_dir()
    assert f"using {made}" in caplog.text


def test_a_folder_that_others_could_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "known").mkdir(mode=0o755)
    assert private_folder(tmp_path / "known") == tmp_path / "known"
    assert stat.S_IMODE((tmp_path / "known").stat().st_mode) == 0o700


@pytest.mark.parametrize("planted", [plain, link, dangling, of_another])
def test_only_folders_of_this_user_are_ours(planted, tmp_path: Path) -> None:
    path = tmp_path / "known"
    with pytest.raises(FileNotFoundError):
        check_ours(path)
    planted(path)
    with pytest.raises(UnsafeFileError, match=f"{path} (is a|belongs to the user)"):
        check_ours(path)


def test_a_group_may_write_to_a_folder_of_ours_but_not_everybody(tmp_path: Path) -> None:
    for mode in (0o700, 0o775, 0o2770, 0o1777):
        tmp_path.chmod(mode)
        check_ours(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(UnsafeFileError, match=r"every user \(mode 0777\).*chmod o-w"):
        check_ours(tmp_path)


def test_a_file_system_that_gives_files_another_owner_is_no_fault(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    check_ours(tmp_path)
