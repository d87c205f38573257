"""Bad input and broken machines: one paragraph, the right exit code, everything earlier intact.

A fault that one rank meets ends all of them within seconds.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_tools import folder as folders
from checkpoints_tools.manifest import read_manifest
from data_pipeline import prepare as preparing
from data_pipeline.dataset import PackedDataset
from data_pipeline.order import sample_indices
from parallel.launch import host_name
from tests.conftest import missing
from tests.pretrain.command import (
    Ended,
    paragraph,
    read_metrics,
    run_command,
    succeed,
    write_config,
)
from tests.tiny import write_text

SECONDS = 20  # a run of one of these sizes takes 1 to 2 to start


def errors_of(ends: list[Ended], code: int) -> list[str]:
    """What each rank said, which must be one paragraph, with this exit code, in time."""
    for end in ends:
        assert end.code == code, end.output
        assert end.seconds < SECONDS
    return [paragraph(end.output) for end in ends]


# -- configuration -------------------------------------------------------------------------------


def test_bad_configuration_ends_with_2_before_torch_is_imported(
    tiny_data: Path, tmp_path: Path
) -> None:
    """A fresh process for each of several mistakes: without torch it starts at once."""
    config = write_config(tmp_path, tiny_data)
    mistakes = {
        "--training.stepz=3": "training.steps",
        "--training.steps=many": "training.steps='many'",
        "--parallel.tensor=3": "use one of [1, 2]",
        "--model.num_kv_heads=3": "model.num_kv_heads=3 does not divide model.num_heads=4",
    }
    script = (
        "import os, sys; from pretrain.cli import main; end = os._exit\n"
        "def report(code): print('torch' in sys.modules, file=sys.stderr); end(code)\n"
        "os._exit = report; main()"
    )
    running = {
        mistake: subprocess.Popen(
            [sys.executable, "-c", script, "pretrain", str(config), mistake],
            stderr=subprocess.PIPE,
            text=True,
        )
        for mistake in mistakes
    }
    for mistake, process in running.items():
        _, stderr = process.communicate(timeout=60)
        *lines, torch_imported = stderr.splitlines()
        assert process.returncode == 2, stderr
        assert torch_imported == "False", mistake
        assert mistakes[mistake] in paragraph("\n".join(lines))
    assert not (tmp_path / "run").exists()


def _name_missing_tiles() -> None:
    os.environ["TRANSXSSM_TILES"] = "/nowhere/tiles.json"


def _force_unknown_kernels() -> None:
    os.environ["TRANSXSSM_KERNELS"] = "cuda"


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (_name_missing_tiles, "TRANSXSSM_TILES: cannot read /nowhere/tiles.json"),
        (_force_unknown_kernels, "TRANSXSSM_KERNELS='cuda'; expected torch"),
    ],
)
def test_bad_environment_ends_with_2_on_every_rank_before_the_run_begins(
    mistake: Callable[[], None], says: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data)
    for error in errors_of(run_command("pretrain", config, ranks=2, before=mistake), 2):
        assert says in error
    assert not (tmp_path / "run").exists()


def test_batch_that_the_ranks_cannot_share_ends_all_with_2(tiny_data: Path, tmp_path: Path) -> None:
    sizes = {"global_batch_size": 6, "micro_batch_size": 2}
    config = write_config(tmp_path, tiny_data, training=sizes)
    for error in errors_of(run_command("pretrain", config, ranks=2), 2):
        assert "training.global_batch_size=6 is not a multiple of" in error
        assert "data parallel 2 = 4; use 4 or 8" in error


def test_run_directory_that_cannot_be_made_ends_with_2(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = write_config(tmp_path, tiny_data)
    override = f"--logging.run_dir={tmp_path / 'file/run'}"
    (error,) = errors_of(run_command("pretrain", config, override), 2)
    assert "logging.run_dir" in error


# -- data and checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("--data.train={tmp}/nowhere", 1, ["nowhere", "no such folder", "transxssm prepare"]),
        ("--data.seq_len=32", 1, ["packed with seq_len 64", "data.seq_len is 32"]),
        ("--model.vocab_size=260", 1, ["300 tokens", "model.vocab_size is 260"]),
    ],
    ids=["missing", "seq_len", "vocabulary"],
)
def test_data_that_does_not_fit(
    override: str, code: int, words: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data)
    (error,) = errors_of(run_command("pretrain", config, override.format(tmp=tmp_path)), code)
    for word in words:
        assert word in error


@pytest.fixture(scope="module")
def ended(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that made a checkpoint at step 2, its last."""
    folder = tmp_path_factory.mktemp("ended")
    succeed("pretrain", write_config(folder, tiny_data, training={"steps": 2}))
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


def test_checkpoint_of_another_model(ended: Path) -> None:
    before = snapshot(ended / "run/checkpoints")
    overrides = ("--training.steps=4", "--model.intermediate_size=128")
    ends = run_command("pretrain", ended / "config.toml", *overrides, ranks=2)
    for error in errors_of(ends, 1):
        assert "trained with another model (model.intermediate_size: 64 there, 128 here)" in error
        assert "model.intermediate_size decides which tensors there are" in error
        assert "allow_model_change" not in error  # it cannot help here
    assert snapshot(ended / "run/checkpoints") == before


def test_checkpoint_of_a_model_with_the_same_tensors(ended: Path) -> None:
    before = snapshot(ended / "run/checkpoints")
    overrides = ("--training.steps=4", "--model.rope_theta=5000")
    for error in errors_of(run_command("pretrain", ended / "config.toml", *overrides), 1):
        assert "trained with another model (model.rope_theta: " in error
        assert "--checkpoint.allow_model_change true" in error
    assert snapshot(ended / "run/checkpoints") == before


def test_checkpoint_of_other_data(ended: Path, shards: Path) -> None:
    before = snapshot(ended / "run/checkpoints")
    overrides = [f"--data.{split}={shards / split}" for split in ("train", "validation")]
    ends = run_command("pretrain", ended / "config.toml", "--training.steps=4", *overrides)
    (error,) = errors_of(ends, 1)
    assert "was trained with another data (data of" in error
    assert "--checkpoint.allow_data_change true" in error
    assert snapshot(ended / "run/checkpoints") == before


# -- a fault that one rank meets -----------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in many small shards, so that ranks read different ones."""
    from data_pipeline.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("shards")
    sources = write_text(folder / "text", 40_000)  # less than runs of 60 steps read
    train_tokenizer(sources, folder / "tokenizer", 300)
    preparing.prepare(
        sources, folder / "tokenizer", folder / "out", 64, validation_fraction=0.3, shard_bytes=3072
    )
    return folder / "out"


def shard_met_by_one(folder: Path, rank: int, global_batch: int, steps: range) -> Path:
    """A shard that this one of two ranks reads in one of the steps, before the other rank does."""
    dataset = PackedDataset(folder)
    first: dict[int, dict[int, int]] = {0: {}, 1: {}}  # rank → shard → step of the first reading
    for step in range(steps.stop + 20):
        counters = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
        indices = sample_indices(1234, counters, len(dataset))
        for reader, share in enumerate(np.split(indices, 2)):
            for shard in np.searchsorted(dataset._ends, share, side="right"):
                first[reader].setdefault(int(shard), step)
    for shard, step in first[rank].items():
        if step in steps and first[1 - rank].get(shard, step + 1) > step:
            return folder / dataset.shards[shard].raw.name
    raise AssertionError("no such shard: make them smaller")


@pytest.mark.parametrize("rank", [0, 1])
def test_shard_that_one_rank_finds_damaged_ends_both(
    rank: int, shards: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    shard = shard_met_by_one(data / "train", rank, global_batch=4, steps=range(3, 6))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    training = {"steps": 12, "eval_every": 0}
    saves = {"every": 1, "async_save": False}
    config = write_config(tmp_path, data, training=training, checkpoint=saves)
    errors = errors_of(run_command("pretrain", config, ranks=2), 1)
    assert str(shard) in errors[rank]
    assert "damaged" in errors[rank]
    assert "stopped because another rank failed" in errors[1 - rank]
    assert f"rank {rank} on {host_name()}: " in errors[1 - rank]
    assert str(shard) in errors[1 - rank]  # the first cause, not the broken connection
    for reader in range(2):
        assert str(shard) in (tmp_path / f"run/logs/rank-{reader}.log").read_text()
    steps = folders.committed_steps(tmp_path / "run/checkpoints")
    assert steps == [read_metrics(tmp_path / "run")[-1]["step"] - i for i in (2, 1, 0)]
    for step in steps:
        read_manifest(folders.step_folder(tmp_path / "run/checkpoints", step))


def break_rank_1_at_step(step: int) -> None:
    """A defect of the program itself, on one rank."""
    from pretrain.trainer import Trainer

    train_step = Trainer.train_step

    def broken(trainer: Trainer, loader: Any) -> dict[str, Any]:
        if trainer.step == step - 1 and os.environ["RANK"] == "1":
            raise RuntimeError("a defect in rank 1 alone")
        return train_step(trainer, loader)

    Trainer.train_step = broken  # type: ignore[method-assign]


def test_defect_on_one_rank_is_traced_there_and_ends_the_other(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, checkpoint={"async_save": False})
    other, broken = run_command(
        "pretrain", config, ranks=2, before=partial(break_rank_1_at_step, 4)
    )
    assert (other.code, broken.code) == (1, 1)
    assert "Traceback" in broken.output
    cause = f"rank 1 on {host_name()}: RuntimeError: a defect in rank 1 alone"
    assert broken.output.startswith(f"error: {cause}\nTraceback")
    assert cause in paragraph(other.output)
    assert "a defect in rank 1 alone" in (tmp_path / "run/logs/rank-1.log").read_text()
    assert folders.committed_steps(tmp_path / "run/checkpoints") == [2]


# -- the disk ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        missing("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if done.returncode:
        missing(f"tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def leave_free(disk: Path, free: int) -> None:
    """Fill the disk up to so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    available = os.statvfs(disk)
    filler.write_bytes(bytes(available.f_bavail * available.f_frsize - free))


def fill_after_first_save(disk: Path, free: int) -> None:
    """Rank 0 fills the disk when the first checkpoint is committed."""
    from pretrain.trainer import Trainer

    save = Trainer.save

    def save_then_fill(trainer: Trainer) -> None:
        save(trainer)
        trainer.saver.drain()
        if os.environ.get("RANK", "0") == "0" and not (disk / "filler").exists():
            leave_free(disk, free)

    Trainer.save = save_then_fill  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("free", "ranks"),
    [(0, 1), (8192, 1), (300_000, 1), (300_000, 2)],
    ids=["at-begin", "at-tokenizer", "at-tensors", "at-tensors-2-ranks"],
)
def test_full_disk_on_save_leaves_the_earlier_checkpoint(
    free: int, ranks: int, small_disk: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, checkpoint={"dir": str(small_disk / "checkpoints")})
    before = partial(fill_after_first_save, small_disk, free)
    ends = run_command("pretrain", config, ranks=ranks, before=before)
    for error in errors_of(ends, 1):
        assert "No space left on device" in error
        assert len(error) < 1000
    checkpoints = small_disk / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000002"]
    read_manifest(checkpoints / "step-00000002")
    assert (checkpoints / "latest").read_text() == "step-00000002\n"
    if free == 8192:  # once there is space, the same command goes on
        (small_disk / "filler").unlink()
        succeed("pretrain", config)
        assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [*range(1, 7)]


def fail_metrics_at_step(step: int) -> None:
    """The run directory's disk is full when a step is recorded."""
    from pretrain.metrics import MetricsWriter

    write = MetricsWriter.write

    def full(writer: MetricsWriter, metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, metrics)

    MetricsWriter.write = full  # type: ignore[method-assign]


def test_full_disk_under_the_metrics(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, checkpoint={"async_save": False})
    ends = run_command("pretrain", config, before=partial(fail_metrics_at_step, 3))
    (error,) = errors_of(ends, 1)
    assert "No space left on device" in error
    assert "same command" in error
    assert folders.committed_steps(tmp_path / "run/checkpoints") == [2]
