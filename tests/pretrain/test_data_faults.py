"""Faults of the data in runs of four processes: one message, all ranks, within seconds."""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.manifest import read_manifest
from data_pipeline.dataset import PackedDataset
from tests.pretrain.command import Ended, paragraph, read_metrics, run_command, write_config
from tests.pretrain.test_faults import shards as shards  # the fixture

RANKS = 4
SECONDS = 10.0  # from the first rank's message to the last rank's end
LONG = {"steps": 60, "eval_every": 0, "micro_batch_size": 1}  # every shard is read
LAYOUTS = {"data": [], "model": ["--parallel.tensor=2", "--parallel.pipeline=2"]}


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-7])


def fail_downloads(behave: str, name: str) -> None:
    """Of a shard, after the run has begun."""
    from data_pipeline import remote

    storage = remote.without_packages("streaming.base.storage.download")
    real = storage.LocalDownloader().download

    def bad(url: str, target: str, timeout: float) -> None:
        if name in url and behave == "fails":
            raise ConnectionError("503 slow down")
        if name in url:
            time.sleep(60)
        real(url, target, timeout)

    storage.LocalDownloader.download = staticmethod(bad)


def check_ends(ends: list[Ended], run: Path, name: str, message: str) -> None:
    """Every rank says what the first one met, and ends soon after."""
    for end in ends:
        assert end.code == 1, end.output
        error = paragraph(end.output)
        assert name in error, error
        assert message in error, error
    first = (run / "logs/first_failure.txt").stat().st_mtime
    last = max((run / f"logs/rank-{rank}.log").stat().st_mtime for rank in range(RANKS))
    assert last - first < SECONDS


@pytest.mark.parametrize(
    ("damage", "message", "layout"),
    [
        (flip, "checksum", "data"),
        (flip, "checksum", "model"),
        (truncate, "cut off", "data"),
        (os.remove, "No such file", "model"),
    ],
    ids=["flipped", "flipped-split", "truncated", "missing-split"],
)
def test_a_bad_local_shard(
    damage: Callable[[Path], None], message: str, layout: str, shards: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    damage(data / "train/shard.000003.mds")
    config = write_config(tmp_path, data, training=LONG)
    ends = run_command("pretrain", config, *LAYOUTS[layout], ranks=RANKS)
    check_ends(ends, tmp_path / "run", "data/train/shard.000003.mds", message)


@pytest.mark.parametrize(
    ("behave", "message"),
    [("fails", "503 slow down"), ("hangs", "nothing came for 1 s")],
)
def test_a_bad_remote(behave: str, message: str, shards: Path, tmp_path: Path) -> None:
    url = f"file://{shards}"
    remote = {
        "train": f"{url}/train", "cache_dir": str(tmp_path / "cache"), "download_attempts": 2,
        "download_timeout": 1.0,
    }  # fmt: skip
    config = write_config(tmp_path, shards, training=LONG, data=remote)
    before = partial(fail_downloads, behave, "shard.000003.mds")
    ends = run_command("pretrain", config, ranks=RANKS, before=before)
    check_ends(ends, tmp_path / "run", f"{url}/train/shard.000003.mds", message)
    if behave == "fails":  # once the remote works, the same command goes on
        again = run_command("pretrain", config, "--training.steps=20", ranks=RANKS)
        assert [end.code for end in again] == [0] * RANKS, again[0].output
        assert read_metrics(tmp_path / "run")[-1]["step"] == 20


def test_other_data_is_refused_unless_told_otherwise(
    shards: Path, tiny_data: Path, tmp_path: Path
) -> None:
    training = LONG | {"steps": 2}
    config = write_config(tmp_path, shards, training=training)
    assert {end.code for end in run_command("pretrain", config, ranks=RANKS)} == {0}
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    shutil.rmtree(data / "train")
    (data / "validation").rename(data / "train")
    more = LONG | {"steps": 4}
    other = write_config(tmp_path, data, training=more, data={"validation": ""})
    ends = run_command("pretrain", other, ranks=RANKS)
    for end in ends:
        assert end.code == 1
        assert "was trained with another data" in paragraph(end.output)
        assert "--checkpoint.allow_data_change true" in end.output
    told = run_command("pretrain", other, "--checkpoint.allow_data_change=true", ranks=RANKS)
    assert {end.code for end in told} == {0}, told[0].output
    assert "going on at sample 8" in told[0].output
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


# -- passing over them ---------------------------------------------------------------------------


def test_bad_shards_are_passed_over_by_all_ranks_up_to_the_cap(
    shards: Path, tmp_path: Path
) -> None:
    layout = ["--parallel.tensor=2"]  # of two replicas of two ranks
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    names = ["shard.000003.mds", "shard.000005.mds", "shard.000008.mds"]
    for name in names[:2]:
        flip(data / "train" / name)
    sections: dict[str, Any] = {"training": LONG | {"steps": 30}}
    allowed = write_config(tmp_path, data, data={"skip_bad_shards": 2}, **sections)
    ends = run_command("pretrain", allowed, *layout, ranks=RANKS)
    assert {end.code for end in ends} == {0}, ends[0].output
    assert ends[0].output.count("skipping bad shard") == 2
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["skipped_shards"] == 2
    state = read_manifest(tmp_path / "run/checkpoints/step-00000030")
    assert sorted(shard for _, shard in state["skipped_shards"]) == [3, 5]
    # one rank that never sees the damage, told at the start which shards to leave out
    assert metrics[-1]["loss"] == pytest.approx(alone(shards, tmp_path / "alone", [3, 5]), rel=1e-4)
    flip(data / "train" / names[2])  # the third is one too many, also after a resume
    more = {"training": LONG}
    again = write_config(tmp_path, data, data={"skip_bad_shards": 2}, **more)
    ends = run_command("pretrain", again, *layout, ranks=RANKS)
    check_ends(ends, tmp_path / "run", names[2], "as many as data.skip_bad_shards=2 allows")


def skip_from_the_start(numbers: list[int]) -> None:
    from pretrain.trainer import Trainer

    build = Trainer.__init__

    def skipping(trainer: Trainer, *arguments: Any) -> None:
        build(trainer, *arguments)
        trainer.skipped = [("train", number) for number in numbers]

    Trainer.__init__ = skipping  # type: ignore[method-assign]


def alone(data: Path, folder: Path, skipped: list[int]) -> float:
    """Loss after 30 steps of one process."""
    config = write_config(folder, data, training=LONG | {"steps": 30})
    before = partial(skip_from_the_start, skipped)
    (end,) = run_command("pretrain", config, before=before)
    assert end.code == 0, end.output
    return float(read_metrics(folder / "run")[-1]["loss"])


def test_a_source_whose_every_shard_is_bad_ends_the_run(shards: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    files = list((data / "train").glob("shard.*"))
    for file in files:
        flip(file)
    config = write_config(tmp_path, data, data={"skip_bad_shards": 1000}, training=LONG)
    ends = run_command("pretrain", config, ranks=2)
    for end in ends:
        assert end.code == 1
        assert f"none of its {len(files)} shards can be read" in paragraph(end.output)


def test_a_fault_of_the_node_ends_the_run_whatever_may_be_skipped(
    shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    data = {"skip_bad_shards": 3, "cache_dir": str(tmp_path / "file/cache")}
    config = write_config(tmp_path, shards, data=data, training=LONG)
    ends = run_command("pretrain", config, ranks=RANKS)
    check_ends(ends, tmp_path / "run", "data.cache_dir", "remove what is in the way")
    assert "skipping" not in ends[0].output


def test_a_bad_validation_shard_ends_the_run(shards: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    flip(data / "validation/shard.000000.mds")
    training = LONG | {"eval_every": 2}
    config = write_config(tmp_path, data, data={"skip_bad_shards": 3}, training=training)
    ends = run_command("pretrain", config, ranks=RANKS)
    check_ends(ends, tmp_path / "run", "validation/shard.000000.mds", "checksum")


def test_skipped_shards_follow_their_data(shards: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    flip(data / "train/shard.000003.mds")

    def run(steps: int, name: str, folder: str, *words: str) -> str:
        sources = [{"name": name, "path": str(data / folder)}]
        sections: dict[str, Any] = {"training": LONG | {"steps": steps}}
        sections["data"] = {"train": "", "sources": sources, "validation": ""}
        sections["data"]["skip_bad_shards"] = 2
        (end,) = run_command("pretrain", write_config(tmp_path, data, **sections), *words)
        assert end.code == 0, end.output
        return end.output

    def skipped(step: int) -> list[list[Any]]:
        state = read_manifest(tmp_path / f"run/checkpoints/step-{step:08d}")
        return list(state["skipped_shards"])

    assert "skipping bad shard 1 of 2" in run(30, "web", "train")
    fingerprint = PackedDataset(data / "train").meta.fingerprint
    assert skipped(30) == [[fingerprint, 3]]
    run(32, "pages", "train")  # only the name is another
    assert skipped(32) == [[fingerprint, 3]]
    output = run(34, "pages", "validation", "--checkpoint.allow_data_change=true")
    assert f"no source is {fingerprint} any more: shard 3 of it is forgotten" in output
    assert skipped(34) == []
