"""The node's cache where other users of the node were first, and what it never does then."""

import fcntl
import multiprocessing
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import pytest

from data_pipeline import node_cache
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.node_cache import NodeCache, default_cache_dir
from data_pipeline.storage import Cache
from tests.conftest import missing
from tests.data_pipeline.test_storage import bucket as bucket
from tests.data_pipeline.test_storage import samples


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR that all users of a node share."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def valuables(tmp_path: Path) -> Path:
    """A folder of the victim's, old enough for every clean-up."""
    folder = tmp_path / "valuables"
    (folder / "thesis").mkdir(parents=True)
    for file in (folder / "notes", folder / "thesis/text"):
        file.write_text("of years")
        os.utime(file, (1, 1))
    return folder


def assert_whole(valuables: Path) -> None:
    assert (
        (valuables / "notes").read_text() == (valuables / "thesis/text").read_text() == "of years"
    )
    assert sorted(path.name for path in valuables.iterdir()) == ["notes", "thesis"]


@pytest.mark.parametrize("subfolder", ["parts", "sound", "shards", "locks", ""])
def test_links_in_a_folder_with_a_known_name_are_not_followed(
    subfolder: str, node: Path, valuables: Path, bucket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planted = default_cache_dir() / subfolder
    planted.parent.mkdir(exist_ok=True)
    planted.symlink_to(valuables)
    expected = samples(PackedDataset(bucket / "train", cache=Cache(bucket / "own")))
    for url in (f"file://{bucket}/train", str(bucket / "train")):
        assert samples(PackedDataset(url, cache=Cache(limit_bytes=1))) == expected
    assert_whole(valuables)
    assert f"{planted} is a link" in caplog.text
    (used,) = (path for path in node.iterdir() if path != default_cache_dir())
    for folder in (used, *used.iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_links_within_the_folders_are_removed_and_not_followed(
    tmp_path: Path, valuables: Path, bucket: Path
) -> None:
    cache, url = Cache(tmp_path / "cache", limit_bytes=1 << 13), f"file://{bucket}/train"
    expected = samples(PackedDataset(url, cache=cache))
    (data,) = (cache.folder / "shards").iterdir()
    names = [path.name for path in data.iterdir()]
    for name in names:
        (data / name).unlink()
        (data / name).symlink_to(valuables / "notes")
    (cache.folder / "parts/9.link").symlink_to(valuables)
    for marker in (cache.folder / "sound").iterdir():
        marker.unlink()
        marker.symlink_to(valuables / "notes")
    assert samples(PackedDataset(url, cache=cache)) == expected
    data.rename(tmp_path / "moved")
    data.symlink_to(valuables)
    with pytest.raises(DataError, match=r"data\.cache_dir .* is a link"):
        samples(PackedDataset(url, cache=cache))
    assert_whole(valuables)


def test_data_that_others_planted_is_not_believed(node: Path, tmp_path: Path, bucket: Path) -> None:
    """Copies and their markers in a folder of another user, as this user's runs would make them."""
    if os.geteuid():
        missing("only root can create files of other users or device files")
    url = f"file://{bucket}/train"
    expected = samples(PackedDataset(url, cache=Cache(tmp_path / "own")))
    other = multiprocessing.get_context("fork").Process(target=_fill, args=(url,))
    other.start()
    other.join()
    for copy in (default_cache_dir() / "shards").glob("*/*"):
        times = copy.stat()
        with copy.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
        os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.chown(default_cache_dir(), 12345, 12345)
    assert samples(PackedDataset(url)) == expected


def test_a_marker_of_another_user_is_not_believed(tmp_path: Path) -> None:
    if os.geteuid():
        missing("only root can create files of other users or device files")
    cache = NodeCache(tmp_path / "cache", 1 << 20)
    cache.mark("a shard")
    assert cache.is_marked("a shard")
    (marker,) = (tmp_path / "cache/sound").iterdir()
    os.chown(marker, 12345, 12345)
    assert not cache.is_marked("a shard")


def _fill(url: str) -> None:
    samples(PackedDataset(url))


def test_a_folder_that_was_named_and_others_can_write_to_gets_one_inside(
    tmp_path: Path, bucket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "scratch"
    shared.mkdir()
    shared.chmod(0o1777)
    samples(PackedDataset(f"file://{bucket}/train", cache=Cache(shared)))
    assert "can be written by others (mode 1777)" in caplog.text
    (used,) = shared.iterdir()
    assert stat.S_IMODE(used.stat().st_mode) == 0o700


def test_a_lock_that_is_held_for_ever_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_cache, "WARN_SECONDS", 0.05)
    monkeypatch.setattr(node_cache, "GIVE_UP_SECONDS", 0.2)
    cache = NodeCache(tmp_path / "cache", 1000)
    with cache.locked("a shard"):
        pass
    for lock in (tmp_path / "cache/locks").iterdir():
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            begin = time.monotonic()
            with pytest.raises(DataError, match=rf"lock {lock} has been held by another process"):
                cache.locked("a shard").__enter__()
            assert time.monotonic() - begin < 5
    assert caplog.text.count("waiting for the lock") == 1


def test_fetches_that_take_all_room_for_ever_end_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache, "GIVE_UP_SECONDS", 0.2)
    cache = NodeCache(tmp_path / "cache", 1000)
    with cache.part(900), pytest.raises(DataError, match=r"room in .* held by another process"):
        cache.part(200).__enter__()


def test_what_the_disk_cannot_hold_removes_no_copies(bucket: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    samples(PackedDataset(f"file://{bucket}/train", cache=cache))
    before = set((cache.folder / "shards").glob("*/*"))
    with pytest.raises(DataError, match=r"bytes to fetch, and the disk has"):
        NodeCache(cache.folder, 1000).part(1 << 60).__enter__()
    assert set((cache.folder / "shards").glob("*/*")) == before


@pytest.mark.parametrize("removed", ["", "parts", "sound"])
def test_folders_that_a_cleaner_of_tmpdir_removed_are_made_again(
    removed: str, tmp_path: Path
) -> None:
    cache = NodeCache(tmp_path / "cache", 1000)
    with cache.part(10):
        cache.mark("a file")
    shutil.rmtree(tmp_path / "cache" / removed)
    with cache.part(10) as part:
        assert part.is_dir()
    assert cache.is_marked("a file") == (removed == "parts")
