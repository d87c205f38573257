"""Two jobs in one run directory: the second is refused, and takes over what a dead one has left."""

import fcntl
import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from benchmarks.ranks import _context
from pretrain import run_lock
from pretrain.config import ConfigError
from tests.pretrain.command import paragraph, read_metrics, run_command, write_config


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    run_lock.release()


def hold_and_wait(folder: Path) -> None:
    run_lock.hold(folder)
    (folder / "held").touch()
    time.sleep(60)


def start_holder(folder: Path) -> BaseProcess:
    """Another process of this host that has the folder."""
    process = _context.Process(target=hold_and_wait, args=(folder,), daemon=True)
    process.start()
    while not (folder / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_record(folder: Path, **fields: str | int) -> None:
    record = {"host": "elsewhere", "pid": 12, "process_started": "7", "job_id": ""}
    record |= {"job_restarts": 0, "since": "2026-01-01T00:00:00+0000"}
    (folder / run_lock.FILE).write_text(json.dumps(record | fields))


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)


def test_second_job_in_a_run_directory_is_refused_before_anything_is_touched(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Whether the two share the run directory or only the folder of checkpoints."""
    saves = {"dir": str(tmp_path / "saves")}
    config = write_config(tmp_path, tiny_data, training={"steps": 2}, checkpoint=saves)
    run_command("pretrain", config)
    holder = start_holder(tmp_path / "run")
    before = contents(tmp_path)
    for end in run_command("pretrain", config, "--training.steps=4", ranks=2):
        assert end.code != 0
        assert f"run is in use: process {holder.pid} on " in paragraph(end.output)
    assert contents(tmp_path) == before
    holder.kill()
    holder = start_holder(tmp_path / "saves")
    other = f"--logging.run_dir={tmp_path / 'other'}"
    (end,) = run_command("pretrain", config, "--training.steps=4", other)
    assert f"saves is in use: process {holder.pid} on " in paragraph(end.output)
    holder.kill()
    holder.join()
    (end,) = run_command("pretrain", config, "--training.steps=4")
    assert end.code == 0, end.output
    assert f"taking the run over, since process {holder.pid}" in end.output
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / run_lock.FILE).exists()


def test_lock_of_a_killed_process_is_taken_over_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder = start_holder(tmp_path)
    with pytest.raises(ConfigError, match=f"process {holder.pid} on .* trains there"):
        run_lock.hold(tmp_path)
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    run_lock.hold(tmp_path)
    assert f"process {holder.pid} on" in caplog.text
    run_lock.hold(tmp_path)  # a folder that this process has
    run_lock.release()
    assert not (tmp_path / run_lock.FILE).exists()


def test_process_with_the_number_of_a_dead_one_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks the record decides."""
    without_locks(monkeypatch)
    own = {"host": run_lock.host_name(), "pid": os.getpid()}
    start = run_lock._process_start(os.getpid())
    write_record(tmp_path, **own, process_started=start)
    with pytest.raises(ConfigError, match="in use"):
        run_lock.hold(tmp_path)
    write_record(tmp_path, **own, process_started=str(int(start) - 1))
    run_lock.hold(tmp_path)
    record = json.loads((tmp_path / run_lock.FILE).read_text())
    assert record["process_started"] == start


def test_without_locks_a_process_of_another_host_is_taken_to_be_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path)
    without_locks(monkeypatch)
    with pytest.raises(ConfigError, match=f"remove {tmp_path}/{run_lock.FILE}"):
        run_lock.hold(tmp_path)
    (tmp_path / run_lock.FILE).unlink()
    run_lock.hold(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize(
    ("answer", "is_free"),
    [
        ("echo RUNNING", False),
        ("echo COMPLETING", False),
        ("echo TIMEOUT", True),
        ("echo PENDING", True),
        ("true", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", False),
    ],
)
def test_slurm_tells_whether_a_job_of_another_host_has_ended(
    answer: str, is_free: bool, locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "bin/squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    if not locks:
        without_locks(monkeypatch)
    write_record(tmp_path, job_id="55")
    if is_free:
        run_lock.hold(tmp_path)
    else:
        with pytest.raises(ConfigError, match="Slurm job 55"):
            run_lock.hold(tmp_path)


def test_start_after_a_requeue_takes_over_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node may have died, and the file server still keep the lock."""
    monkeypatch.setattr(run_lock, "_lock", lambda _: False)
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    write_record(tmp_path, job_id="55", job_restarts=1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match="Slurm job 55"):
        run_lock.hold(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run_lock.hold(tmp_path)
    assert json.loads((tmp_path / run_lock.FILE).read_text())["job_restarts"] == 2


def test_record_that_a_crash_left_empty_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / run_lock.FILE).touch()
    run_lock.hold(tmp_path)
    assert json.loads((tmp_path / run_lock.FILE).read_text())["pid"] == os.getpid()


def test_no_job_is_submitted_for_a_run_that_trains(tmp_path: Path) -> None:
    run_lock.refuse_held(tmp_path)
    holder = start_holder(tmp_path)
    with pytest.raises(ConfigError, match=f"process {holder.pid}"):
        run_lock.refuse_held(tmp_path)
    holder.kill()
    holder.join()
    run_lock.refuse_held(tmp_path)
