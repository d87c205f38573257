"""Remote and compressed shards, the node's cache, and checks made once."""

import logging
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import remote, storage
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import BadShardError, DataError
from data_pipeline.inspection import inspect_dataset, verify_dataset
from data_pipeline.prepare import prepare
from data_pipeline.storage import Cache
from tests.data_pipeline.conftest import SEQ_LEN
from tests.data_pipeline.test_prepare import contents

SMALL: dict[str, Any] = {"unit_bytes": 3000, "shard_bytes": 2048, "validation_fraction": 0.2}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", attempts=3, timeout=5)


def samples(dataset: PackedDataset) -> list[tuple[list[int], list[int], int]]:
    found = dataset.read(np.arange(len(dataset)))
    return [(s.tokens.tolist(), s.doc_lens.tolist(), s.num_pad) for s in found]


def copies(cache: Cache) -> list[Path]:
    """Shards in the cache."""
    return list((cache.folder / "shards").glob("*/*"))


def copied(cache: Cache) -> set[str]:
    """Their names, without the checksums in front."""
    return {path.name.partition("-")[2] for path in copies(cache)}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are checked a block at a time, the last one ragged."""
    monkeypatch.setattr(storage, "BLOCK", 1000)


@pytest.mark.parametrize("format", ["mds", "webdataset"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.usefixtures("small_blocks")
def test_samples_are_the_same_wherever_they_are_stored(
    format: Any, compression: Any, corpus: Path, tokenizer_file: Path, prepared: Path,
    tmp_path: Path, cache: Cache,
) -> None:  # fmt: skip
    """`prepared` is local, uncompressed MDS."""
    arguments = ([corpus], tokenizer_file)
    options: dict[str, Any] = {"validation_fraction": 0.2, "workers": 1, "format": format}
    options |= {"compression": compression, "shard_bytes": 4096 if format == "mds" else 40960}
    prepare(*arguments, tmp_path / "local", SEQ_LEN, **options)
    url = f"file://{tmp_path}/bucket/data"
    prepare(*arguments, url, SEQ_LEN, **options)
    for split in ("train", "validation"):
        expected = samples(PackedDataset(prepared / split))
        assert samples(PackedDataset(tmp_path / "local" / split, cache=cache)) == expected
        assert samples(PackedDataset(f"{url}/{split}", cache=cache)) == expected
    verify_dataset(tmp_path / "local")
    verify_dataset(url)
    assert inspect_dataset(url)["train"]["sample_0_text"]


def test_the_library_reads_compressed_shards(
    corpus: Path, tokenizer_file: Path, tmp_path: Path, cache: Cache
) -> None:
    import streaming

    prepare([corpus], tokenizer_file, tmp_path / "o", SEQ_LEN, compression="zstd", workers=1,
            shard_bytes=4096)  # fmt: skip
    ours = PackedDataset(tmp_path / "o" / "train", cache=cache)
    copy = str(shutil.copytree(tmp_path / "o" / "train", tmp_path / "c"))
    theirs = streaming.StreamingDataset(local=copy, shuffle=False, batch_size=1)
    assert len(theirs) == len(ours)
    for index in range(len(ours)):
        assert (theirs[index]["tokens"] == ours[index].tokens).all()
        assert (theirs[index]["doc_lens"] == ours[index].doc_lens).all()


def test_shares_and_kills_do_not_change_a_byte_at_a_url(
    corpus: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    def run(name: str, **options: Any) -> Any:
        url = f"file://{tmp_path}/{name}"
        return prepare([corpus], tokenizer_file, url, SEQ_LEN, **SMALL | options)

    metas = run("one", workers=1)
    assert metas["train"].documents + metas["validation"].documents == 120
    expected = contents(tmp_path / "one")
    for share in (3, 1):
        assert run("three", workers=1, share=(share, 3), merge=False) == {}
    with pytest.raises(DataError, match="not done"):
        run("three", workers=1, share=(1, 3))
    run("three", workers=1, share=(2, 3))
    assert contents(tmp_path / "three") == expected
    kill = multiprocessing.get_context("fork").Process(target=_die_at_upload, args=(run, 7))
    kill.start()
    kill.join()
    assert kill.exitcode == 9
    assert not (tmp_path / "killed/train/meta.json").exists()
    run("killed", workers=2)
    assert contents(tmp_path / "killed") == expected


def _die_at_upload(run: Any, countdown: int) -> None:
    from data_pipeline import remote_units

    upload = remote_units.upload

    def fatal(*arguments: Any, **options: Any) -> None:
        nonlocal countdown
        countdown -= 1
        if not countdown:
            os._exit(9)
        upload(*arguments, **options)

    remote_units.upload = fatal
    run("killed", workers=1)


# -- downloading ---------------------------------------------------------------------------------


@pytest.fixture
def bucket(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared`, to be read as file:// URLs and to break."""
    return Path(shutil.copytree(prepared, tmp_path / "bucket"))


class Failing:
    """A downloader that fails so often first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int, only: str) -> None:
        downloads = remote.without_packages("streaming.base.storage.download")
        self.real, self.left, self.only = downloads.LocalDownloader().download, failures, only
        monkeypatch.setattr(downloads.LocalDownloader, "download", self)

    def __call__(self, url: str, target: str, timeout: float) -> None:
        if self.only in url and self.left > 0:
            self.left -= 1
            Path(target).write_bytes(b"half")
            raise ConnectionError("reset by peer")
        self.real(url, target, timeout)


def test_a_remote_that_fails_is_tried_again(
    bucket: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Failing(monkeypatch, 2, "shard.000001")
    dataset = PackedDataset(f"file://{bucket}/train", cache=cache)
    logging.getLogger("transxssm").propagate = True
    with caplog.at_level(logging.WARNING, "transxssm"):
        assert samples(dataset) == samples(PackedDataset(bucket / "train"))
    tried = [r.getMessage() for r in caplog.records]
    assert len(tried) == 2
    assert "shard.000001.mds: cannot be downloaded (reset by peer); attempt 2 in" in tried[0]


@pytest.mark.parametrize("name", ["shard.000001", "index.json"])
def test_a_remote_that_goes_on_failing_is_named(
    name: str, bucket: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, 99, name)
    begin = time.monotonic()
    with pytest.raises(DataError, match=rf"file://.*/{name}.*after 3 attempts \(reset by peer\)"):
        samples(PackedDataset(f"file://{bucket}/train", cache=cache))
    assert time.monotonic() - begin < 2
    assert not any(name.startswith("shard.000001") for name in copied(cache))


def test_a_remote_that_goes_silent_is_given_up(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    downloads = remote.without_packages("streaming.base.storage.download")
    end = threading.Event()

    def silent(url: str, target: str, timeout: float) -> None:
        Path(target).write_bytes(b"half")
        end.wait(20)

    monkeypatch.setattr(downloads.LocalDownloader, "download", staticmethod(silent))
    cache, begin = Cache(tmp_path / "cache", attempts=2, timeout=0.5), time.monotonic()
    with pytest.raises(DataError, match=r"meta\.json.* 2 attempts \(nothing came for 0\.5 s\)"):
        PackedDataset(f"file://{bucket}/train", cache=cache)
    assert time.monotonic() - begin < 5
    (told,) = caplog.messages  # within one time-out
    assert "meta.json: cannot be downloaded (nothing came for 0.5 s); attempt 2" in told
    end.set()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_damaged_remote_shard_never_enters_the_cache(
    compression: Any, corpus: Path, tokenizer_file: Path, tmp_path: Path, cache: Cache
) -> None:
    url = f"file://{tmp_path}/b"
    prepare([corpus], tokenizer_file, url, SEQ_LEN, workers=1, compression=compression,
            shard_bytes=4096)  # fmt: skip
    (shard,) = (tmp_path / "b/train").glob("shard.*-002*")
    flip(shard)
    for _ in range(2):
        with pytest.raises(BadShardError, match=rf"{shard.name}: checksum") as found:
            samples(PackedDataset(f"{url}/train", cache=cache))
        assert found.value.shard == 2
    stem = shard.name.split(".mds")[0]
    assert not any(name.startswith(stem) for name in copied(cache))


def test_other_data_at_the_same_url_is_other_data(
    corpus: Path, tokenizer_file: Path, tmp_path: Path, cache: Cache
) -> None:
    url, found = f"file://{tmp_path}/b", []
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        prepare([corpus], tokenizer_file, url, SEQ_LEN, seed=seed, validation_fraction=0.5,
                workers=1)  # fmt: skip
        found.append(samples(PackedDataset(f"{url}/train", cache=cache)))
        assert found[-1] == samples(PackedDataset(tmp_path / "b/train"))
    assert found[0] != found[1]


def test_copies_stay_below_the_bound(bucket: Path, tmp_path: Path) -> None:
    shards = PackedDataset(bucket / "train").shards
    bound = sum(shard.raw.size for shard in shards) // 3
    cache = Cache(tmp_path / "cache", limit_bytes=bound)
    dataset = PackedDataset(f"file://{bucket}/train", cache=cache)
    expected = PackedDataset(bucket / "train")
    for index in np.random.default_rng(0).integers(0, len(dataset), 200).tolist():
        dataset._open.clear()  # as a rank that starts
        assert (dataset[index].tokens == expected[index].tokens).all()
        assert sum(path.stat().st_size for path in copies(cache)) <= bound
    assert len(copies(cache)) > 1


def test_what_was_used_longest_ago_goes_first(bucket: Path, tmp_path: Path) -> None:
    size = PackedDataset(bucket / "train").shards[0].raw.size
    cache = Cache(tmp_path / "cache", limit_bytes=int(2.5 * size))
    dataset = PackedDataset(f"file://{bucket}/train", cache=cache)
    starts = [0, *np.cumsum([s.samples for s in dataset.shards]).tolist()]
    for shard in (0, 1, 0, 2):
        dataset._open.clear()
        _ = dataset[starts[shard]]
        time.sleep(0.01)
    assert copied(cache) == {"shard.000000.mds", "shard.000002.mds"}


def _read_all(url: str, cache: Cache, log: Path) -> None:
    downloads = remote.without_packages("streaming.base.storage.download")
    real = downloads.LocalDownloader().download

    def counted(source: str, target: str, timeout: float) -> None:
        if "shard" in source:
            with log.open("a") as file:
                file.write(source + "\n")
        real(source, target, timeout)

    downloads.LocalDownloader.download = staticmethod(counted)
    samples(PackedDataset(url, cache=cache))


def test_ranks_of_a_node_download_a_shard_once(bucket: Path, tmp_path: Path, cache: Cache) -> None:
    context, url = multiprocessing.get_context("fork"), f"file://{bucket}/train"
    log = tmp_path / "log"
    ranks = [context.Process(target=_read_all, args=(url, cache, log)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    found = log.read_text().splitlines()
    assert len(found) == len(set(found)) == len(PackedDataset(bucket / "train").shards)


# -- local shards --------------------------------------------------------------------------------


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files whose checksums have been computed."""
    names: list[str] = []
    real = storage.check

    def counted(file: Any, info: Any, name: str) -> None:
        names.append(Path(name).name)
        real(file, info, name)

    monkeypatch.setattr(storage, "check", counted)
    return names


def test_local_shards_are_checked_once_a_node_until_they_change(
    bucket: Path, cache: Cache, checks: list[str]
) -> None:
    for _ in range(2):  # as two ranks of a node
        samples(PackedDataset(bucket / "train", cache=cache))
    assert len(checks) == len(set(checks)) > 1
    flip(bucket / "train/shard.000001.mds")
    with pytest.raises(BadShardError, match=r"shard\.000001\.mds: checksum"):
        samples(PackedDataset(bucket / "train", cache=cache))


def test_threads_read_while_shards_are_opened_and_closed(
    bucket: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.dataset.MAX_OPEN", 2)
    dataset = PackedDataset(bucket / "train", cache=cache)
    expected = samples(PackedDataset(bucket / "train"))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, len(dataset), 500).tolist():
            if dataset[index].tokens.tolist() != expected[index][0]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(dataset._open) <= 2 + len(threads)


def test_a_cache_that_cannot_be_written_is_named(bucket: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"data\.cache_dir .*file/cache"):
        samples(PackedDataset(bucket / "train", cache=cache))


def test_the_tokenizer_is_that_of_the_data(bucket: Path, cache: Cache) -> None:
    for place in (str(bucket / "train"), f"file://{bucket}/train"):
        content = PackedDataset(place, cache=cache).tokenizer()
        assert content == (bucket / "tokenizer.json").read_bytes()
    (bucket / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not the tokenizer that"):
        PackedDataset(bucket / "train", cache=cache).tokenizer()
    (bucket / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        PackedDataset(bucket / "train", cache=cache).tokenizer()
