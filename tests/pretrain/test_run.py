"""Runs that are killed and go on: digit for digit, from the newest sound checkpoint."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkpoint_layouts import stored_tensors
from benchmarks.ranks import run_ranks
from checkpoints_tools import folder as folders
from checkpoints_tools.manifest import read_manifest
from tests.pretrain.command import read_metrics, run_command, succeed, write_config

STEPS = 6
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single-fp32": (1, {}),
    "data2-zero3-fp32": (2, {"parallel": {"zero_stage": 3}}),
    "interleaved-bf16": (
        2,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "training": {"dtype": "bf16"}},
    ),
}
EXACT = ("step", "tokens", "samples", "loss", "perplexity", "grad_norm", "lr")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_step(step: int) -> None:
    """SIGKILL this process when it is about to make a step; all earlier ones are recorded."""
    from pretrain.trainer import Trainer

    train_step = Trainer.train_step

    def fatal(trainer: Trainer, loader: Any) -> dict[str, Any]:
        if trainer.step == step - 1:
            trainer.saver.drain()
            die()
        return train_step(trainer, loader)

    Trainer.train_step = fatal  # type: ignore[method-assign]


def die_after_save(step: int) -> None:
    """SIGKILL this process as soon as the checkpoint of a step is committed."""
    from pretrain.trainer import Trainer

    save = Trainer.save

    def fatal(trainer: Trainer) -> None:
        save(trainer)
        if trainer.step == step:
            trainer.saver.drain()
            die()

    Trainer.save = fatal  # type: ignore[method-assign]


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """The part of the metrics that must not depend on when the run was interrupted."""
    names = (*EXACT, "validation_loss")
    return [{n: entry[n] for n in names if n in entry} for entry in read_metrics(run_dir)]


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(
    request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """(layout, folder of an uninterrupted run, folder of one killed before step 6, saved at 4)."""
    ranks, sections = LAYOUTS[request.param]
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    succeed("pretrain", write_config(whole, tiny_data, **sections), ranks=ranks)
    before = partial(die_before_step, STEPS)
    for end in run_command(
        "pretrain", write_config(killed, tiny_data, **sections), ranks=ranks, before=before
    ):
        assert end.code == -signal.SIGKILL, end.output
    assert [e["step"] for e in read_metrics(killed / "run")] == [1, 2, 3, 4, 5]
    assert folders.committed_steps(killed / "run/checkpoints") == [2, 4]
    return request.param, whole, killed


def test_resumed_run_equals_uninterrupted_digit_for_digit(
    runs: tuple[str, Path, Path], tmp_path: Path
) -> None:
    layout, whole, killed = runs
    shutil.copytree(killed / "run", tmp_path / "run")
    override = f"--logging.run_dir={tmp_path / 'run'}"
    succeed("pretrain", killed / "config.toml", override, ranks=LAYOUTS[layout][0])
    assert [e["step"] for e in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert curve(tmp_path / "run") == curve(whole / "run")
    expected = stored_tensors(whole / "run/checkpoints/step-00000006", random=True)
    found = stored_tensors(tmp_path / "run/checkpoints/step-00000006", random=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert "resumed from" in (tmp_path / "run/logs/rank-0.log").read_text()


@pytest.mark.parametrize("runs", ["data2-zero3-fp32"], indirect=True)
def test_resume_on_another_layout_continues_the_curve(
    runs: tuple[str, Path, Path], tmp_path: Path
) -> None:
    _, whole, killed = runs
    shutil.copytree(killed / "run", tmp_path / "run")
    succeed(
        "pretrain", killed / "config.toml", "--logging.run_dir", tmp_path / "run",
        "--parallel.zero_stage=1",
    )  # fmt: skip
    found, expected = curve(tmp_path / "run"), curve(whole / "run")
    assert found[:4] == expected[:4]
    for one, other in zip(found[4:], expected[4:], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    starts = (tmp_path / "run/environment.json").read_text()
    assert '"world_size": 2' in starts
    assert '"world_size": 1' in starts


def test_death_right_after_a_save_loses_no_metrics(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    (end,) = run_command("pretrain", config, before=partial(die_after_save, 4))
    assert end.code == -signal.SIGKILL, end.output
    assert folders.committed_steps(tmp_path / "run/checkpoints") == [2, 4]
    succeed("pretrain", config)
    assert [e["step"] for e in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_run_that_has_ended_changes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, training={"steps": 2})
    succeed("pretrain", config)
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    state = tmp_path / "run/checkpoints/step-00000002/manifest.json"
    written = state.stat().st_mtime_ns
    succeed("pretrain", config)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    assert state.stat().st_mtime_ns == written


def test_kills_at_random_moments_then_the_same_command_completes(
    tiny_data: Path, tmp_path: Path
) -> None:
    """A fresh process, as a user starts it, and a forked one; both save after every step."""
    sections: dict[str, Any] = {
        "training": {"steps": 16, "eval_every": 0},
        "checkpoint": {"every": 1, "keep_last": 2},
    }
    config = write_config(tmp_path / "killed", tiny_data, **sections)
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    metrics = tmp_path / "killed/run/metrics.jsonl"
    fresh = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "pretrain", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert fresh.poll() is None, f"it ended with {fresh.returncode} before its first step"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 1.5))
    fresh.kill()
    codes = [fresh.wait()]
    (end,) = run_command("pretrain", config, kill_after=moments.uniform(0.5, 2.0))
    codes.append(end.code)
    assert set(codes) <= {-signal.SIGKILL, 0}, (seed, codes)
    succeed("pretrain", config)
    checkpoints = tmp_path / "killed/run/checkpoints"
    assert [e["step"] for e in read_metrics(tmp_path / "killed/run")] == [*range(1, 17)], seed
    assert folders.committed_steps(checkpoints) == [15, 16], seed
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "latest", "step-00000015", "step-00000016",
    ]  # fmt: skip
    whole = write_config(tmp_path / "whole", tiny_data, **sections)
    succeed("pretrain", whole)
    assert curve(tmp_path / "killed/run") == curve(tmp_path / "whole/run"), seed


# -- which checkpoint a run starts from ----------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that ended, with checkpoints of steps 2, 4 and 6 and a config.toml."""
    folder = tmp_path_factory.mktemp("ended")
    succeed("pretrain", write_config(folder, tiny_data))
    return folder


@pytest.fixture
def copy(ended: Path, tmp_path: Path, tiny_data: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path, tiny_data)
    return tmp_path


def truncate(step_dir: Path) -> None:
    """Cut the largest file in half."""
    file = max(step_dir.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def lose_a_file(step_dir: Path) -> None:
    (step_dir / "tensors.json").unlink()


def flip_a_bit(step_dir: Path) -> None:
    file = max(step_dir.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def garble_state(step_dir: Path) -> None:
    (step_dir / "manifest.json").write_text('{"step": 6, "files": {')


def empty_state(step_dir: Path) -> None:
    (step_dir / "manifest.json").write_text("null")


def lose_state(step_dir: Path) -> None:
    (step_dir / "manifest.json").unlink()


DAMAGES = [truncate, flip_a_bit, lose_a_file, garble_state, empty_state, lose_state]


def start_of(config: Path, *overrides: str) -> str:
    """Name of the step folder that a run would start from, or its error; warnings before it."""
    import logging

    from checkpoints_tools.errors import CheckpointError
    from parallel.compat import prepare_host
    from parallel.groups import init_distributed
    from parallel.launch import launch_from_environment
    from pretrain.config import load_config
    from pretrain.resume import find_start
    from pretrain.sources import open_blend

    init_distributed(launch_from_environment(), prepare_host())

    warnings: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(f"{record.levelname} {record.getMessage()}")

    log = logging.getLogger("transxssm")
    log.handlers, log.propagate = [Collect()], False
    loaded = load_config(config, list(overrides))
    try:
        start = find_start(loaded, open_blend(loaded))
    except CheckpointError as error:
        return "\n".join([*warnings, f"error: {error}"])
    return "\n".join([*warnings, str(start and start.folder.name)])


def starts_of(folders_: list[Path]) -> list[str]:
    return [start_of(folder / "config.toml") for folder in folders_]


def test_auto_falls_back_from_damaged_checkpoints_with_a_warning(
    ended: Path, tmp_path: Path, tiny_data: Path
) -> None:
    one_damaged, all_damaged = [], []
    for damage in DAMAGES:
        for folder in (tmp_path / damage.__name__, tmp_path / f"{damage.__name__}-all"):
            shutil.copytree(ended, folder)
            write_config(folder, tiny_data)
            damage(folder / "run/checkpoints/step-00000006")
        one_damaged.append(tmp_path / damage.__name__)
        for step in ("step-00000002", "step-00000004"):
            damage(tmp_path / f"{damage.__name__}-all/run/checkpoints" / step)
        all_damaged.append(tmp_path / f"{damage.__name__}-all")
    (answers,) = run_ranks(1, starts_of, one_damaged + all_damaged)
    for damage, answer in zip(DAMAGES, answers[: len(DAMAGES)], strict=True):
        warning, start = answer.split("\n")
        assert warning.startswith("WARNING SKIPPING A DAMAGED CHECKPOINT"), damage.__name__
        assert "step-00000006" in warning, damage.__name__
        assert start == "step-00000004", damage.__name__
    for damage, answer in zip(DAMAGES, answers[len(DAMAGES) :], strict=True):
        *warnings, error = answer.split("\n")
        assert len(warnings) == 3, damage.__name__
        assert "none of the 3 checkpoints" in error, damage.__name__


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(copy: Path, ended: Path) -> None:
    checkpoints = copy / "run/checkpoints"
    truncate(checkpoints / "step-00000006")
    (checkpoints / "step-00000008.tmp").mkdir()
    (checkpoints / "step-00000008.tmp/part").write_text("of an interrupted save")
    (end,) = run_command("pretrain", copy / "config.toml")
    assert end.code == 0, end.output
    assert "WARNING SKIPPING A DAMAGED CHECKPOINT" in (copy / "run/logs/rank-0.log").read_text()
    assert curve(copy / "run") == curve(ended / "run")
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "latest", "step-00000002", "step-00000004", "step-00000006",
    ]  # fmt: skip
    assert (checkpoints / "latest").read_text() == "step-00000006\n"
    for step in folders.committed_steps(checkpoints):
        read_manifest(folders.step_folder(checkpoints, step))


def test_retention_never_removes_what_was_just_saved(copy: Path) -> None:
    checkpoints = copy / "run/checkpoints"
    truncate(checkpoints / "step-00000006")
    overrides = ["--checkpoint.every=1", "--checkpoint.keep_last=1"]
    before = partial(die_after_save, 5)
    (end,) = run_command("pretrain", copy / "config.toml", *overrides, before=before)
    assert end.code == -signal.SIGKILL, end.output
    read_manifest(checkpoints / "step-00000005")
    assert (checkpoints / (checkpoints / "latest").read_text().strip()).is_dir()


def explicit_starts(copy: Path) -> list[str]:
    config, checkpoints = copy / "config.toml", copy / "run/checkpoints"
    return [
        start_of(config, "--checkpoint.resume=none"),
        start_of(config, "--checkpoint.resume=none", f"--logging.run_dir={copy / 'new'}"),
        start_of(config, f"--checkpoint.resume={checkpoints / 'step-00000002'}"),
        start_of(config, f"--checkpoint.resume={copy / 'run'}"),
        start_of(config, f"--checkpoint.resume={copy / 'elsewhere'}"),
        start_of(config, f"--checkpoint.resume={checkpoints / 'step-00000004'}"),
    ]


def test_resume_none_and_a_path(copy: Path) -> None:
    truncate(copy / "run/checkpoints/step-00000004")
    (answers,) = run_ranks(1, explicit_starts, copy)
    none, new, path, run, missing, damaged = answers
    assert none.startswith('error: checkpoint.resume="none"')
    assert "up to step 6" in none
    assert new == "None"
    assert "later checkpoints, up to step 6" in path  # going back needs them out of the way
    assert run == "step-00000006"
    assert "elsewhere is not there; going on from the run's own, of step 6" in missing
    assert missing.endswith("step-00000006")
    assert damaged.startswith("error: ")  # asked for by name: no fallback
    assert "step-00000004" in damaged


def test_retention_keeps_the_last_and_the_milestones(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        tiny_data,
        training={"steps": 7, "eval_every": 0},
        checkpoint={"every": 1, "keep_last": 2, "keep_every": 3},
    )
    succeed("pretrain", config)
    checkpoints = tmp_path / "run/checkpoints"
    assert folders.committed_steps(checkpoints) == [3, 6, 7]
    assert (checkpoints / "latest").read_text() == "step-00000007\n"
    assert folders.resolve(tmp_path / "run") == checkpoints / "step-00000007"
