"""Saves beside training: what is written, when the state may change, what ranks do on a fault."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkpoint_layouts import stored_tensors
from benchmarks.ranks import run_ranks
from benchmarks.trainers import open_trainer
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import damaged_files, read_manifest
from pretrain.config import Config
from tests.tiny import tiny_config

STEP = "step-00000003"


def trainer_of(config: Config) -> Any:
    """A trainer after three steps, whose run directory has what a save needs."""
    trainer = open_trainer(config)
    trainer.read = trainer.batches()
    for _ in range(3):
        trainer.train_step(trainer.read)
    return trainer


def save_slowly(config: Config) -> bool:
    """Save while steps go on, the copy held back until one waits for it; whether one did."""
    from checkpoints_tools import saving

    trainer = trainer_of(config)
    go = threading.Event()
    begin = saving.HostCopy.begin

    def held(host: Any, tensors: Any) -> Any:
        copy = begin(host, tensors)
        return lambda: (go.wait(), copy())[1]

    saving.HostCopy.begin = held  # type: ignore[method-assign]
    trainer.save()
    waited = not trainer.saver._flight.copied.is_set()
    threading.Timer(0.3, go.set).start()
    for _ in range(3):
        trainer.saver.poll()
        trainer.train_step(trainer.read)
    trainer.saver.drain()
    trainer.read.close()
    return waited and trainer.saver._stalled == 0.0  # the step's metrics have it


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2}, {"zero_stage": 3}], ids=["zero1", "tensor2", "zero3"]
)
def test_what_is_saved_is_the_state_when_it_was_asked_for(
    parallel: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    def config(name: str, background: bool) -> Config:
        saves = {"async_save": background}
        return tiny_config(tiny_data, tmp_path / name, parallel=parallel, checkpoint=saves)

    assert run_ranks(2, save_slowly, config("beside", True)) == [True, True]
    run_ranks(2, save_at_once, config("sync", False))
    beside, sync = (stored_tensors(tmp_path / n / "checkpoints" / STEP) for n in ("beside", "sync"))
    assert beside.keys() == sync.keys()
    assert all(torch.equal(beside[name], tensor) for name, tensor in sync.items())


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (4, {"zero_stage": 1}),
        (4, {"zero_stage": 0}),
        (4, {"tensor": 2, "zero_stage": 0}),
        (4, {"zero_stage": 3, "context": 2}),
    ],
    ids=lambda value: (
        "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None
    ),
)
def test_ranks_write_alike(
    world_size: int, parallel: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    model = {"hidden_size": 128, "intermediate_size": 256}
    config = tiny_config(tiny_data, tmp_path / "run", parallel=parallel, model=model)
    run_ranks(world_size, save_at_once, config)
    files = read_manifest(tmp_path / "run/checkpoints" / STEP)["files"]
    sizes = [entry["bytes"] for name, entry in files.items() if name.endswith(".safetensors")]
    assert len(sizes) == world_size
    assert max(sizes) < 1.15 * sum(sizes) / world_size
    assert sum(sizes) > 12 * config.model.num_params()["total"]


def save_at_once(config: Config) -> None:
    """Three steps and a save, waited for."""
    trainer = trainer_of(config)
    trainer.save()
    trainer.saver.drain()
    trainer.read.close()


def fail_on_rank_1(config: Config) -> tuple[str, int]:
    """Save soundly; then rank 1's disk fails; what was raised, and at which later step."""
    from checkpoints_tools import saving

    trainer = trainer_of(config)
    trainer.save()
    trainer.saver.drain()
    write = saving._write

    def failing(*arguments: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(*arguments)

    saving._write = failing
    trainer.train_step(trainer.read)
    trainer.save()
    for _ in range(50):
        try:
            trainer.saver.poll()
        except CheckpointError as error:
            trainer.read.close()
            return str(error), trainer.step
        trainer.train_step(trainer.read)
    raise AssertionError("nothing was raised")


def test_a_failing_writer_is_reported_by_all_ranks_at_one_step(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    (first, step), (second, other) = run_ranks(2, fail_on_rank_1, config)
    assert first == second
    assert step == other
    assert "step-00000004.tmp failed: rank 1: [Errno 5] Input/output error" in first
    assert "earlier checkpoints are intact" in first
    checkpoints = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", STEP]
    assert not damaged_files(checkpoints / STEP, read_manifest(checkpoints / STEP))


def save_twice(config: Config) -> int:
    trainer = trainer_of(config)
    trainer.save()
    trainer.train_step(trainer.read)
    trainer.save()
    committed = (Path(config.logging.run_dir) / "checkpoints" / STEP).is_dir()
    trainer.saver.drain()
    trainer.read.close()
    return committed


def test_a_second_save_waits_for_the_first(tiny_data: Path, tmp_path: Path) -> None:
    assert run_ranks(2, save_twice, tiny_config(tiny_data, tmp_path / "run")) == [True, True]
    for step in (3, 4):
        read_manifest(tmp_path / f"run/checkpoints/step-{step:08d}")


def test_a_manifest_tells_what_it_is_of(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", parallel={"tensor": 2})
    run_ranks(2, save_at_once, config)
    step_dir = tmp_path / "run/checkpoints" / STEP
    manifest = read_manifest(step_dir)
    assert manifest["step"] == 3
    assert manifest["samples"] == 24
    assert manifest["layout"]["tensor"] == 2
    assert manifest["layout"]["data"] == 1
    assert manifest["versions"].keys() >= {"torch", "deepspeed", "megatron-core"}
    assert manifest["config"]["model"]["hidden_size"] == config.model.hidden_size
    names = {path.name for path in step_dir.iterdir()}
    assert set(manifest["files"]) == names - {"manifest.json"}


def exchange(a: Path, b: Path) -> None:
    a.rename(a.with_suffix(".x"))
    b.rename(a)
    a.with_suffix(".x").rename(b)


def test_what_was_changed_after_it_was_written_is_found(tiny_data: Path, tmp_path: Path) -> None:
    run_ranks(2, save_at_once, tiny_config(tiny_data, tmp_path / "run"))
    step_dir = tmp_path / "run/checkpoints" / STEP
    first, second = step_dir / "rank-00000.safetensors", step_dir / "rank-00001.safetensors"
    text = (step_dir / "manifest.json").read_text()
    (step_dir / "manifest.json").write_text(text.replace('"samples": 24', '"samples": 25'))
    with pytest.raises(CheckpointError, match=r"manifest\.json was changed"):
        read_manifest(step_dir)
    (step_dir / "manifest.json").write_text(text)
    renamed = step_dir.rename(step_dir.with_name("step-00000007"))
    with pytest.raises(CheckpointError, match="is of step-00000003, but lies in step-00000007"):
        read_manifest(renamed)
    renamed.rename(step_dir)
    manifest = read_manifest(step_dir)
    exchange(first, second)
    found = damaged_files(step_dir, manifest)
    assert found.keys() == {first.name, second.name}
    if first.stat().st_size == second.stat().st_size:
        assert f"it is {second.name}" in found[first.name]


def random_numbers_before_and_after(config: Config) -> bool:
    """Whether the numbers after a save are drawn again once it is loaded."""
    from checkpoints_tools.sharded import load_checkpoint

    trainer = trainer_of(config)
    torch.manual_seed(7)
    trainer.save()
    trainer.saver.drain()
    drawn = torch.rand(5)
    load_checkpoint(config.checkpoint_dir / STEP, trainer.zero)
    trainer.read.close()
    return torch.equal(torch.rand(5), drawn)


def test_random_numbers_go_on_where_they_were(tiny_data: Path, tmp_path: Path) -> None:
    assert run_ranks(1, random_numbers_before_and_after, tiny_config(tiny_data, tmp_path)) == [True]
