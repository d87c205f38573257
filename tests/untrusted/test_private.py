"""Folders with predictable names: what others may have put there first."""

import os
import stat
from pathlib import Path

import pytest

from untrusted.private import private_folder


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
        pytest.skip("needs root")
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
