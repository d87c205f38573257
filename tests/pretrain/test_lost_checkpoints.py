"""A run that has lost its checkpoints does not begin again in silence, nor loses its record."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.errors import CheckpointError
from pretrain.config import Config
from pretrain.lost_checkpoints import keep_record, record_saves
from pretrain.metrics import MetricsWriter
from tests.pretrain.command import at_step, paragraph, read_metrics, run_command, write_config
from tests.tiny import tiny_config

ENTRY = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_second": 1.0, "memory_bytes": 1}


@pytest.fixture(scope="module")
def ended(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps, of which metrics.jsonl was removed during the second."""
    folder = tmp_path_factory.mktemp("ended")
    config = write_config(folder, tiny_data, training={"steps": 2, "eval_every": 0})
    remove = partial(os.unlink, folder / "run/metrics.jsonl")
    (end,) = run_command("pretrain", config, before=partial(at_step, 2, 0, remove))
    assert end.code == 0, end.output
    assert end.output.count("metrics.jsonl was removed") == 1
    return folder


def test_removed_metrics_are_written_again(ended: Path) -> None:
    assert [entry["step"] for entry in read_metrics(ended / "run")] == [1, 2]


def edit_dir(run_dir: Path) -> list[str]:
    return [f"--checkpoint.dir={run_dir / 'elsewhere'}"]


def restart_from_another(run_dir: Path) -> list[str]:
    (run_dir / "checkpoints").rename(run_dir.parent / "other")
    return [f"--checkpoint.resume={run_dir.parent / 'other'}"]


@pytest.mark.parametrize("lose", [edit_dir, restart_from_another], ids=lambda f: f.__name__)
def test_lost_checkpoints_are_refused_until_told(
    lose: Callable[[Path], list[str]], ended: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(ended / "run", run)
    saves = json.loads((run / "checkpoints.json").read_text())
    assert saves == {"folder": str(ended / "run/checkpoints"), "step": 2}
    (run / "checkpoints.json").unlink()  # of an older version
    record = (run / "metrics.jsonl").read_bytes()
    options = [f"--logging.run_dir={run}", *lose(run)]
    (end,) = run_command("pretrain", ended / "config.toml", *options)
    assert end.code == 1, end.output
    assert f"{run} is the record of a run of 2 steps" in paragraph(end.output)
    assert "--checkpoint.begin_again true" in paragraph(end.output)
    assert (run / "metrics.jsonl").read_bytes() == record
    assert not (run / "elsewhere").exists()
    (end,) = run_command("pretrain", ended / "config.toml", *options, "--checkpoint.begin_again=2")
    assert end.code == 2, end.output
    options.append("--checkpoint.begin_again=true")
    (end,) = run_command("pretrain", ended / "config.toml", *options, "--training.steps=3")
    assert end.code == 0, end.output
    assert (run / "old-record-1/metrics.jsonl").read_bytes() == record
    first = 3 if lose is restart_from_another else 1
    assert [entry["step"] for entry in read_metrics(run)] == [*range(first, 4)]


def test_run_whose_newest_checkpoint_is_gone_is_refused_until_told(
    tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fields = {"steps": 2, "eval_every": 0}
    config = write_config(tmp_path, tiny_data, training=fields, checkpoint={"every": 1})
    (end,) = run_command("pretrain", config)
    assert end.code == 0, end.output
    record = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints/step-00000002")
    (end,) = run_command("pretrain", config)
    assert end.code == 1, end.output
    assert "holds checkpoints up to step 1 only" in paragraph(end.output)
    assert (run / "metrics.jsonl").read_bytes() == record
    (end,) = run_command("pretrain", config, "--checkpoint.begin_again=true")
    assert end.code == 0, end.output
    assert (run / "old-record-1/metrics.jsonl").read_bytes() == record
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2]


# -- without training ----------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run with a record of three steps."""
    (tmp_path / "run").mkdir()
    write_metrics(tmp_path / "run", 3)
    return tiny_config(tmp_path, tmp_path / "run")


def write_metrics(run_dir: Path, steps: int) -> None:
    writer = MetricsWriter(run_dir, 0, steps, 1, tensorboard=False)
    for step in range(1, steps + 1):
        writer.write(ENTRY | {"step": step})
    writer.close()


def with_dir(config: Config, folder: Path, **fields: Any) -> Config:
    checkpoint = config.checkpoint.model_copy(update={"dir": str(folder), **fields})
    return config.model_copy(update={"checkpoint": checkpoint})


def test_run_that_ended_before_its_first_checkpoint_goes_on(config: Config) -> None:
    record_saves(config)
    keep_record(config, [])
    record_saves(config, 2)
    with pytest.raises(CheckpointError, match="record of a run of 3 steps"):
        keep_record(config, [])


def test_both_folders_are_named(config: Config, tmp_path: Path) -> None:
    record_saves(config, 2)
    with pytest.raises(CheckpointError) as caught:
        keep_record(with_dir(config, tmp_path / "new"), [])
    for folder in (tmp_path / "run", tmp_path / "run/checkpoints", tmp_path / "new"):
        assert str(folder) in str(caught.value)


def test_folder_with_the_checkpoints_of_another_run_is_refused(
    config: Config, tmp_path: Path
) -> None:
    record_saves(config, 3)
    moved = with_dir(config, tmp_path / "new")
    keep_record(moved, [2, 3])  # they were moved
    with pytest.raises(CheckpointError, match="holds checkpoints up to step 1 only"):
        keep_record(moved, [1])


def test_newest_checkpoints_that_are_gone_are_missed(config: Config, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "run/checkpoints"
    (run / "tensorboard").mkdir()
    (run / "tensorboard/events").write_text("events")
    record = (run / "metrics.jsonl").read_bytes()
    record_saves(config, 3)
    keep_record(config, [2, 3])  # of which 3 may be damaged
    with pytest.raises(CheckpointError) as caught:
        keep_record(config, [1, 2])
    for said in (folder, "saved up to step 3,", "up to step 2 only", "--checkpoint.begin_again"):
        assert str(said) in str(caught.value)
    told: list[dict[str, Any]] = [
        {"begin_again": True}, {"resume": str(folder / "step-00000002")},
    ]  # fmt: skip
    for number, fields in enumerate(told, 1):
        keep_record(with_dir(config, folder, **fields), [1, 2])
        aside = run / f"old-record-{number}"
        assert (aside / "metrics.jsonl").read_bytes() == record
        assert (aside / "tensorboard/events").read_text() == "events"
        assert (run / "metrics.jsonl").read_bytes() == record  # the run goes on with it
    with pytest.raises(CheckpointError):
        keep_record(with_dir(config, folder, resume=str(folder / "step-00000001")), [1, 2])


def test_checkpoints_that_the_run_itself_removes_are_not_missed(config: Config) -> None:
    for step in (1, 2, 3):
        (config.checkpoint_dir / f"step-{step:08d}").mkdir(parents=True)
    record_saves(config)
    with pytest.raises(CheckpointError):
        keep_record(config, [1, 2])
    record_saves(config, last_step=2)  # as when it goes back, before it removes
    keep_record(config, [1, 2])
    keep_record(config, [1, 2, 3])


@pytest.mark.parametrize("content", [b"\0" * 4096, b'{"step": "3"}\n', b"\xff\xfe\n"])
def test_damaged_record_is_not_erased(content: bytes, config: Config, tmp_path: Path) -> None:
    (tmp_path / "run/metrics.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError, match="an unknown number of steps"):
        keep_record(config, [])
    keep_record(with_dir(config, tmp_path / "run/checkpoints", begin_again=True), [])
    assert (tmp_path / "run/old-record-1/metrics.jsonl").read_bytes() == content
    keep_record(config, [])  # nothing is on record


@pytest.mark.parametrize("content", ["", "null", '{"folder": 3, "step": 1}', '{"step": NaN}'])
def test_damaged_note_of_checkpoints_is_as_none(
    content: str, config: Config, tmp_path: Path
) -> None:
    (tmp_path / "run/checkpoints.json").write_text(content)
    keep_record(config, [1])
    with pytest.raises(CheckpointError):
        keep_record(config, [])


# -- metrics.jsonl while training ----------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def remove_run(path: Path) -> None:
    shutil.rmtree(path.parent)


def replace(path: Path) -> None:
    path.rename(path.with_name("mine"))
    shutil.copyfile(path.with_name("mine"), path)


def link_elsewhere(path: Path) -> None:
    path.rename(path.with_name("mine"))
    path.symlink_to("mine")


@pytest.mark.parametrize("fault", [remove, remove_run, replace, link_elsewhere])
def test_no_step_is_lost(fault: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    writer = MetricsWriter(tmp_path / "run", 0, 4, 1, tensorboard=False)
    for step in range(1, 5):
        writer.write(ENTRY | {"step": step})
        if step == 2:
            fault(tmp_path / "run/metrics.jsonl")
    writer.close()
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_folder_in_its_place_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain import metrics

    monkeypatch.setattr(metrics.log, "propagate", True)
    writer = MetricsWriter(tmp_path, 0, 4, 1, tensorboard=False)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    for step in (1, 2):
        writer.write(ENTRY | {"step": step})
    writer.close()
    assert caplog.text.count("cannot be written") == 1
