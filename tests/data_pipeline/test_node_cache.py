"""The cache that processes of a node share: copies that change, room, and what is left behind."""

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import node_cache, remote
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import BadShardError, DataError
from data_pipeline.node_cache import NodeCache
from data_pipeline.storage import Cache
from tests.data_pipeline.test_storage import bucket as bucket
from tests.data_pipeline.test_storage import cache as cache
from tests.data_pipeline.test_storage import checks as checks
from tests.data_pipeline.test_storage import copies, samples
from tests.data_pipeline.test_storage import short_waits as short_waits


def overwrite_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [overwrite_end, empty])
def test_damaged_copies_are_fetched_again(
    damage: Callable[[Path], None], bucket: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    url, expected = f"file://{bucket}/train", samples(PackedDataset(bucket / "train"))
    assert samples(PackedDataset(url, cache=cache)) == expected
    for path in copies(cache):
        damage(path)
    assert samples(PackedDataset(url, cache=cache)) == expected
    assert "a copy is not sound and will be fetched again" in caplog.text


def test_a_copy_that_changes_while_it_is_read_is_fetched_again(bucket: Path, cache: Cache) -> None:
    expected = PackedDataset(bucket / "train")
    dataset = PackedDataset(f"file://{bucket}/train", cache=cache)
    _ = dataset[0]
    (copy,) = copies(cache)
    os.truncate(copy, 0)
    assert (dataset[1].tokens == expected[1].tokens).all()


def test_copies_are_checked_once_though_they_are_used_often(
    bucket: Path, cache: Cache, checks: list[str]
) -> None:
    for _ in range(3):  # as ranks of a node
        samples(PackedDataset(f"file://{bucket}/train", cache=cache))
        time.sleep(0.01)
    assert len(checks) == len(set(checks)) == len(copies(cache))


# -- room ----------------------------------------------------------------------------------------


def test_a_tar_and_its_offsets_are_read_from_the_smallest_cache(
    prepared_tars: Path, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", limit_bytes=1)
    dataset = PackedDataset(f"file://{prepared_tars}/train", cache=cache)
    assert samples(dataset) == samples(PackedDataset(prepared_tars / "train"))


def bytes_in(folder: Path) -> int:
    """Of its files, some of which may go meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(f"{place}/{name}").st_size
    return total


def _read_at_random(urls: list[str], cache: Cache, bound: int, seed: int) -> None:
    sources = [PackedDataset(url, cache=cache) for url in urls]
    for _ in range(50):
        source = random.Random(seed).choice(sources)
        source.close()
        seed += 1
        _ = source[seed * 7919 % len(source)]
        with NodeCache(cache.folder, bound).locked(node_cache.ROOM):  # nothing is removed now
            used = bytes_in(cache.folder / "shards") + bytes_in(cache.folder / "parts")
        assert used <= bound, (used, bound)


def test_processes_and_sources_stay_below_the_bound_together(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache, "WAIT_SECONDS", 0.002)
    size = max(shard.raw.size for shard in PackedDataset(bucket / "train").shards)
    bound = int(2.5 * size)
    cache = Cache(tmp_path / "cache", limit_bytes=bound)
    urls = [f"file://{bucket}/{split}" for split in ("train", "validation")]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_read_at_random, args=(urls, cache, bound, 100 * rank))
        for rank in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0


def test_what_killed_processes_and_old_runs_left_goes(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    with cache.part(600) as living:
        killed = Path(shutil.copytree(living, tmp_path / "parts/999.killed"))
        (killed / "shard").write_bytes(bytes(999))
        with cache.part(400):
            assert living.exists()
            assert not killed.exists()
    assert not list((tmp_path / "parts").iterdir())
    cache.mark("old")
    (marker,) = (tmp_path / "sound").iterdir()
    stale = time.time() - (node_cache.MARKER_DAYS + 1) * 24 * 3600
    os.utime(marker, (stale, stale))
    NodeCache(tmp_path, 1000).mark("new")
    assert not cache.is_marked("old")
    assert cache.is_marked("new")


def test_locks_are_few(bucket: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "LOCKS", 2)
    samples(PackedDataset(f"file://{bucket}/train", cache=cache))
    assert {path.name for path in (cache.folder / "locks").iterdir()} == {"00", "01", "room"}


# -- faults of the node --------------------------------------------------------------------------


def first_sample(url: str, cache: Cache) -> DataError:
    """The error that reading raises."""
    dataset = PackedDataset(url, cache=cache)
    with pytest.raises(DataError) as found:
        _ = dataset[0]
    return found.value


def test_an_unusable_cache_is_no_bad_shard(bucket: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    for place in (f"{bucket}/train", f"file://{bucket}/train"):
        error = first_sample(place, cache)
        assert not isinstance(error, BadShardError)
        assert f"data.cache_dir {tmp_path}/file: Not a directory ({tmp_path}/file/" in str(error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EMFILE])
def test_a_download_that_this_node_refuses_is_no_bad_shard(
    number: int, bucket: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = remote.without_packages("streaming.base.storage.download")
    real = downloads.LocalDownloader().download
    tries = []

    def full(url: str, target: str, timeout: float) -> None:
        if "shard" in url:
            tries.append(url)
            raise OSError(number, os.strerror(number), target)
        real(url, target, timeout)

    monkeypatch.setattr(downloads.LocalDownloader, "download", staticmethod(full))
    error = first_sample(f"file://{bucket}/train", cache)
    assert not isinstance(error, BadShardError)
    assert os.strerror(number) in str(error)
    assert len(tries) == 1  # it does not go away by trying again


def _without_files(place: str, cache: Cache, queue: Any) -> None:
    dataset = PackedDataset(place, cache=cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        dataset.read(np.array([0]))
    except DataError as error:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        queue.put((type(error).__name__, str(error)))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_too_many_open_files_is_no_bad_shard(scheme: str, bucket: Path, cache: Cache) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    place = f"{scheme}{bucket}/train"
    rank = context.Process(target=_without_files, args=(place, cache, queue))
    rank.start()
    rank.join(30)
    name, message = queue.get()
    assert name == "DataError"
    assert "Too many open files" in message
