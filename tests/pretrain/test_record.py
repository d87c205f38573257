"""What only the record of a run suffers from: training goes on, and says so once."""

import contextlib
import errno
import io
import logging
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain import metrics
from pretrain.config import ConfigError
from pretrain.metrics import MetricsWriter
from pretrain.trackers import open_trackers
from tests.pretrain.command import at_step, paragraph, read_metrics, run_command, write_config
from tests.tiny import tiny_config

ENTRY = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_second": 1.0, "memory_bytes": 1}
RUNNING: dict[str, Any] = {
    "training": {"steps": 12, "eval_every": 0},
    "logging": {"tensorboard": True},
}


def remove_tensorboard(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)  # it may be written to meanwhile


def bad_tensorboard(run_dir: Path) -> None:
    """TensorBoard's own thread meets the error, and tells it later."""
    from tensorboard.summary.writer.record_writer import (  # type: ignore[import-untyped]
        RecordWriter,
    )

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    RecordWriter.write = fail
    RecordWriter.flush = fail


def full_log(run_dir: Path) -> None:
    """The log's file is one that takes nothing."""
    (handler,) = [
        h for h in logging.getLogger("transxssm").handlers if isinstance(h, logging.FileHandler)
    ]
    handler.stream = open("/dev/full", "w")  # noqa: SIM115


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (remove_tensorboard, None),
        (bad_tensorboard, "TensorBoard cannot be written ([Errno 28]"),
        (full_log, "rank-0.log cannot be written"),
    ],
)
def test_training_goes_on_without_a_part_of_its_record(
    fault: Callable[[Path], None], says: str | None, tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, **RUNNING)
    (end,) = run_command(
        "pretrain", config, before=partial(at_step, 2, 0, partial(fault, tmp_path / "run"))
    )
    assert end.code == 0, end.output
    assert "Traceback" not in end.output
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [*range(1, 13)]
    if says is not None:
        assert end.output.count(says) == 1


def tensorboard_is_a_file(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "tensorboard").write_text("")


def test_writer_without_a_tensorboard_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.log, "propagate", True)
    tensorboard_is_a_file(tmp_path / "run")
    writer = MetricsWriter(tmp_path / "run", 0, 3, 1, tensorboard=True)
    for step in (1, 2):
        writer.write(ENTRY | {"step": step})
    writer.text("a", "b", 2)
    writer.close()
    assert len(read_metrics(tmp_path / "run")) == 2
    assert caplog.text.count("TensorBoard cannot be written") == 1


class SmallDisk(io.FileIO):
    """A file on a disk that has room for `room` bytes more."""

    room = 100

    def write(self, data: Any) -> int:
        part = bytes(data)[: self.room]
        if data and not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(part)
        return super().write(part)


def test_lines_wait_while_the_disk_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.log, "propagate", True)
    tmp_path.joinpath("run").mkdir()
    writer = MetricsWriter(tmp_path / "run", 0, 9, 1, False)
    writer.file.close()
    writer.file = disk = SmallDisk(tmp_path / "run/metrics.jsonl", "a+")
    for step in range(1, 7):
        writer.write(ENTRY | {"step": step})
    assert caplog.text.count("metrics.jsonl cannot be written ([Errno 28]") == 1
    disk.room = 10**6
    for step in (7, 8):
        writer.write(ENTRY | {"step": step})
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [*range(1, 9)]
    disk.room = 20
    writer.write(ENTRY | {"step": 9})
    writer.close()
    assert caplog.text.count("metrics.jsonl cannot be written ([Errno 28]") == 2
    assert "metrics.jsonl lacks its last 1 lines" in caplog.text


class FailingTracker:
    """As one whose server or disk is gone."""

    def write(self, _: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        pass


def test_tracker_that_fails_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.log, "propagate", True)
    tmp_path.joinpath("run").mkdir()
    writer = MetricsWriter(tmp_path / "run", 0, 3, 1, False, [FailingTracker()])
    for step in (1, 2):
        writer.write(ENTRY | {"step": step})
    writer.close()
    assert len(read_metrics(tmp_path / "run")) == 2
    assert caplog.text.count("FailingTracker cannot be written") == 1


def test_wandb_that_refuses_and_wandb_that_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb
    from wandb.errors import CommError, UsageError

    monkeypatch.setattr(metrics.log, "propagate", True)
    errors: list[Exception] = [UsageError("No API key configured."), CommError("timed out")]

    def fail(**_: Any) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(wandb, "init", fail)
    config = tiny_config(tmp_path, tmp_path / "run", logging={"wandb_project": "tests"})
    with pytest.raises(ConfigError, match=r"wandb_project='tests'.*No API key.*wandb login"):
        open_trackers(config)
    assert open_trackers(config) == []
    assert "W&B does not answer (timed out)" in caplog.text


def test_full_standard_error_and_log(tmp_path: Path) -> None:
    """Neither a traceback nor an end."""
    script = (
        "import logging, pathlib, sys; from pretrain.run_dir import begin_log, start_log; "
        "start_log(pathlib.Path(sys.argv[1]), 0); begin_log(); "
        "log = logging.getLogger('transxssm'); "
        "[log.info('step %d', n) for n in range(3)]; print('on')"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=full, text=True, check=True,
        )  # fmt: skip
    assert done.stdout == "on\n"
    lines = (tmp_path / "logs/rank-0.log").read_text().splitlines()
    assert sum("step" in line for line in lines) == 3
    assert sum("standard error cannot be written" in line for line in lines) == 1


def limit_files() -> None:
    """So that a checkpoint is too large for a file, and the record is not."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def limit_descriptors() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_limit_of_a_files_size_is_one_sentence(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, **RUNNING)
    (end,) = run_command("pretrain", config, before=limit_files)
    assert end.code == 1, end.output
    assert "run/checkpoints" in paragraph(end.output)


def test_few_file_descriptors_suffice_or_are_one_sentence(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, **RUNNING)
    for end in run_command("pretrain", config, ranks=2, before=limit_descriptors):
        if end.code:
            assert "ulimit -n" in paragraph(end.output)


# -- commands that print -------------------------------------------------------------------------


def run_in_terminal(words: list[str], until: Callable[[], bool]) -> int:
    """`transxssm WORDS` in a terminal that is closed at a moment; the exit code."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pretrain", *words]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    reader = threading.Thread(target=read_all, args=(ours,), daemon=True)
    reader.start()
    while process.poll() is None and not until():
        time.sleep(0.05)
    os.close(ours)
    return process.wait(60)


def read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def test_a_terminal_that_goes_away_ends_no_run(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, training={"steps": 60, "eval_every": 0})
    record = tmp_path / "run/metrics.jsonl"
    code = run_in_terminal(
        ["pretrain", str(config)], lambda: record.exists() and record.stat().st_size > 2000
    )
    assert (code, len(read_metrics(tmp_path / "run"))) == (0, 60)


def test_closed_streams_are_no_error(tiny_data: Path, tmp_path: Path) -> None:
    assert printed_to(">&-", tmp_path) == (0, "")
    config = write_config(tmp_path / "w", tiny_data, training={"steps": 2, "eval_every": 0})
    words = f'{sys.executable} -m pretrain pretrain "{config}" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", words], check=False)
    assert (done.returncode, len(read_metrics(tmp_path / "w/run"))) == (0, 2)


def printed_to(place: str, tmp_path: Path) -> tuple[int, str]:
    config = tmp_path / "config.toml"
    config.write_text('data = {train = "t", validation = "v"}')
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'{sys.executable} -m pretrain estimate "$0" {place}',
         str(config)],
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_output_that_is_lost_is_an_error(tmp_path: Path) -> None:
    code, stderr = printed_to("> /dev/full", tmp_path)
    assert code == 1
    assert "No space left on device" in paragraph(stderr)


def test_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    code, stderr = printed_to("| true", tmp_path)
    assert code in (0, 1)
    assert stderr == ""
