"""One damaged run hides no other, and nothing of it reaches the terminal as an escape."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.config import ConfigError, load_config
from slurm import jobs
from slurm.cli import _duration, _sparkline
from slurm.cluster import ClusterConfig
from slurm.jobs import JobLog, active_jobs
from slurm.runs import RunStatus, run_status
from slurm.script import Request
from slurm.submit import submit
from tests.pretrain.command import write_config

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
JOB = '{"job_id": "12", "submitted": "now"}\n'
STEP = '{"step": 3, "tokens": 768, "loss": 5.0, "tokens_per_second": 256.0}\n'
FILES = {
    "jobs.jsonl": JOB, "environment.json": "[{}]", "metrics.jsonl": STEP,
    "logs/first_failure.txt": "", "checkpoints/latest": "step-00000002",
}  # fmt: skip
DAMAGED: list[bytes] = [
    b"", b"\n", b"null", b"[[]]", b"\xff\xfe\x00", b'{"job_id": "1', b"\x00" * 4096, b"[" * 100_000,
    b'{"job_id": 12, "step": NaN}\n', ESCAPE.encode(),
]  # fmt: skip


@pytest.fixture
def runs(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two runs; Slurm knows jobs 12 and 13."""
    config = write_config(tmp_path / "w", tiny_data)
    for name in ("good", "bad"):
        run_dir = tmp_path / "runs" / name
        (run_dir / "logs").mkdir(parents=True)
        (run_dir / "checkpoints").mkdir()
        for file, text in FILES.items():
            (run_dir / file).write_text(text)
        (run_dir / "config.toml").write_text(
            config.read_text().replace(str(tmp_path / "w/run"), str(run_dir))
        )
    known = {"state": "RUNNING", "nodes": "n1", "restarts": "0", "time_left": "1:00", "reason": ""}
    monkeypatch.setattr(jobs, "active_jobs", lambda: {"12": known, "13": known})
    monkeypatch.setattr("slurm.submit.active_jobs", lambda: {})
    cancelled: list[str] = []

    def slurm(*words: str, **_: Any) -> str:
        cancelled.extend(words)
        return "14\n"

    monkeypatch.setattr(jobs, "slurm", slurm)
    monkeypatch.setattr("slurm.submit.slurm", slurm)
    return tmp_path / "runs"


def outcome(*words: str | Path) -> Any:
    """The command's result; an error is one of ours, of one line."""
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exit_code:
        assert type(result.exception).__name__ in ("ConfigError", "SlurmError", "UntrustedError")
    for text in (result.stdout, result.stderr):
        assert text.replace("\n", "").isprintable(), text
    return result


def other_is_shown(runs: Path) -> str:
    """What `runs` says of the bad one, while it shows the other."""
    result = outcome("runs", runs, "--json")
    assert result.exit_code == 0
    (good,) = (run for run in json.loads(result.stdout) if run["run_dir"].endswith("good"))
    assert (good["step"], good["state"], good["damaged"]) == (3, "running", [])
    return str(result.stderr)


def with_content(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def as_folder(path: Path, _: bytes) -> None:
    path.unlink()
    path.mkdir()


def as_endless_device(path: Path, _: bytes) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_pipe(path: Path, _: bytes) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", [*FILES, "config.toml"])
def test_a_damaged_file_of_one_run_hides_no_other(name: str, runs: Path) -> None:
    path = runs / "bad" / name
    sound = path.read_bytes()
    for damage, content in [
        *((with_content, content) for content in DAMAGED),
        (with_content, sound[: len(sound) // 2]),
        (as_folder, b""),
        (as_endless_device, b""),
        (as_pipe, b""),
    ]:
        damage(path, content)
        warning = other_is_shown(runs)
        assert not warning or "bad" in warning
        status = outcome("status", runs / "bad")
        if name != "config.toml":
            assert status.exit_code == 0
        cancelled = outcome("cancel", runs / "bad")
        assert (cancelled.exit_code == 0) == (name != "jobs.jsonl"), content
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(sound)


@pytest.mark.parametrize("rate", [-1e-300, -1e-320, 1e-320, -5.0, 0.0, 1e308, None])
def test_a_rate_that_no_machine_has_is_unknown(rate: float | None, runs: Path) -> None:
    line = {"step": 1, "tokens": 0, "tokens_per_second": rate}
    (runs / "bad/metrics.jsonl").write_text(f"{json.dumps(line)}\n" * 2)
    assert not other_is_shown(runs)
    status = json.loads(outcome("status", runs / "bad", "--json").stdout)
    assert (status["tokens_per_second"], status["seconds_left"]) == (None, None)
    assert outcome("status", runs / "bad").exit_code == 0
    listed = outcome("runs", runs)
    assert listed.exit_code == 0
    assert str(runs / "good") in listed.stdout
    assert str(runs / "bad") in listed.stdout


def test_losses_that_are_far_apart_are_not_drawn(runs: Path) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in enumerate([1e308, -1e308, 2.0, 1.0])]
    (runs / "bad/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = outcome("status", runs / "bad")
    assert result.exit_code == 0
    assert "█▁" in result.stdout
    assert _sparkline([5e-324, 0.0]) == "█▁"
    (runs / "bad/metrics.jsonl").write_text(f"{json.dumps(lines[0])}\n")
    listed = outcome("runs", runs).stdout
    assert "1e+308" in listed
    assert "0" * 20 not in listed


def test_time_left_is_shown_whatever_it_is() -> None:
    shown = [_duration(seconds) for seconds in (None, -1e300, 61.0, 1e300, float("inf"))]
    assert shown == ["", "0:00:00", "0:01:01", "centuries", "centuries"]


def test_a_run_that_cannot_be_shown_hides_no_other(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(status: RunStatus) -> list[str]:
        if status.run_dir.endswith("bad"):
            raise OverflowError("too much")
        return [status.run_dir]

    monkeypatch.setattr("slurm.cli._row", row)
    result = outcome("runs", runs)
    assert result.exit_code == 0
    assert str(runs / "good") in result.stdout
    assert f"{runs / 'bad'} is left out: too much" in result.stderr


@pytest.mark.parametrize("command", ["status", "runs"])
def test_a_warning_that_cannot_be_written_ends_no_command(command: str, runs: Path) -> None:
    (runs / "bad/metrics.jsonl").write_text("{\n")
    squeue = runs.parent / "bin/squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\nexit 1\n")
    squeue.chmod(0o755)
    target = runs / "bad" if command == "status" else runs
    env = os.environ | {"PATH": f"{squeue.parent}:{os.environ['PATH']}"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "pretrain", command, str(target)],
            env=env, stdout=subprocess.PIPE, stderr=full, text=True,
        )  # fmt: skip
    assert ended.returncode == 0
    assert str(runs / "bad") in ended.stdout


def test_the_sound_lines_of_a_damaged_record_of_jobs_count(runs: Path) -> None:
    path = runs / "bad/jobs.jsonl"
    path.write_text('\n{"job_id": "1\n' + JOB + '\x00\x00\n{"job_id": "13"')
    warning = other_is_shown(runs)
    assert warning.count(f"{path}, line") >= 2
    assert "cancelled 12" in outcome("cancel", runs / "bad").stdout
    record = JobLog(runs / "bad")
    record.add("13")
    assert JobLog(runs / "bad").job_ids == ["12", "13"]
    assert "cancelled 12, 13" in outcome("cancel", runs / "bad").stdout


def test_submitting_again_beside_a_damaged_record(
    runs: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    (runs.parent / "cluster.toml").write_text("gpus_per_node = 0")
    monkeypatch.setenv("TRANSXSSM_CLUSTER", str(runs.parent / "cluster.toml"))
    path = runs / "bad/jobs.jsonl"
    for content in DAMAGED:
        path.write_bytes(content)
        result = outcome("submit", runs / "bad/config.toml", "--nodes", "1")
        assert result.exit_code == 0, result.exception
        assert JobLog(runs / "bad").job_ids[-1] == "14"
        assert str(path) in result.stderr or not content


def event(run_dir: Path, name: str, **fields: Any) -> None:
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": "now", "event": name, **fields}) + "\n")


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([("start", {"pid": os.getpid(), "host": platform.node()})], "running"),
        ([("start", {"pid": 2**22 + 1, "host": platform.node()})], "killed"),
        ([("start", {"pid": 2**52, "host": platform.node()})], "killed"),
        ([("start", {"pid": 1, "host": "another"})], "running"),
        ([("start", {}), ("end", {"how": "stopped", "said": "SIGINT"})], "stopped"),
        ([("end", {"how": "done"}), ("start", {"pid": 2**22 + 1, "host": platform.node()})],
         "killed"),
        ([("end", {"how": "failed", "said": "why"}), ("rollback", {})], "failed"),
    ],
)  # fmt: skip
def test_state_follows_from_how_the_last_start_ended(
    events: list[tuple[str, dict[str, Any]]],
    state: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (runs / "good/logs/first_failure.txt").unlink()
    for name, fields in events:
        event(runs / "good", name, **fields)
    found = run_status(runs / "good", {})
    assert (found.state, found.damaged) == (state, [])
    assert found.failure == ("why" if state == "failed" else None)
    if events[-1] == ("start", {"pid": 1, "host": "another"}):  # and has not written for long
        for path in (runs / "good").glob("**/*"):
            os.utime(path, (0, 0))
        assert run_status(runs / "good", {}).state == "killed"


def test_a_later_start_with_fewer_steps_has_no_time_left(runs: Path) -> None:
    path = runs / "good/config.toml"
    path.write_text(path.read_text().replace("steps = 6", "steps = 2"))
    event(runs / "good", "end", how="done", said="step 3 of 2")
    (runs / "good/jobs.jsonl").unlink()
    shown = outcome("status", runs / "good").stdout
    assert "2 (now configured)" in shown
    assert " left " not in shown
    assert json.loads(outcome("status", runs / "good", "--json").stdout)["seconds_left"] is None


@pytest.mark.parametrize("words", [["runs", "nothing"], ["runs"], ["runs", "nothing", "--json"]])
def test_runs_of_nothing_is_an_error(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = outcome(*words)
    assert result.exit_code
    assert "there is no such folder" in str(result.exception)


def test_a_folder_without_runs_is_told_of(runs: Path) -> None:
    empty = runs / "good/logs"
    assert "there is no run in it" in outcome("runs", empty).stderr
    assert outcome("runs", empty, "--json").stdout == "[]\n"


def test_a_run_named_without_its_folder_is_pointed_out(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    for command in ("status", "report", "logs", "cancel"):
        assert "there is one in runs/good" in str(outcome(command, "good").exception)
    assert "did you mean runs/good" in str(outcome("runs", "good").exception)


def test_logs_without_slurm_are_those_of_rank_0(runs: Path) -> None:
    run_dir = runs / "good"
    nothing = outcome("logs", run_dir)
    assert "nothing is logged yet" in str(nothing.exception)
    for rank in (0, 3):
        (run_dir / f"logs/rank-{rank}.log").write_text(f"of rank {rank}\n")
    assert outcome("logs", run_dir).stdout == "of rank 0\n"
    assert outcome("logs", run_dir, "--rank", "3").stdout == "of rank 3\n"
    assert "rank 9 has no log" in str(outcome("logs", run_dir, "--rank", "9").exception)
    (run_dir / "job-12.log").write_text("of the job\n")
    assert outcome("logs", run_dir).stdout == "of the job\n"
    os.utime(run_dir / "job-12.log", (1e9, 1e9))  # the run went on without Slurm
    assert outcome("logs", run_dir).stdout == "of rank 0\n"


def test_an_old_configuration_is_named(runs: Path) -> None:
    path = runs / "bad/config.toml"
    path.write_text(path.read_text() + "\n[old]\nfield = 3\n")
    warning = other_is_shown(runs)
    assert str(runs / "bad") in warning
    assert "old" in warning
    table = outcome("runs", runs)
    assert str(runs / "good") in table.stdout
    assert str(runs / "bad") in table.stderr
    with pytest.raises(ConfigError, match="old"):
        CliRunner().invoke(app, ["status", str(runs / "bad")], catch_exceptions=False)


def test_no_escape_reaches_the_terminal(runs: Path) -> None:
    bad = runs / "bad"
    (bad / "logs/first_failure.txt").write_text(f"rank 1: {ESCAPE} source")
    (bad / "checkpoints/latest").write_text(ESCAPE)
    (bad / "logs/rank-0.log").write_bytes(f"a\tb {ESCAPE}\r\nc \u00e9".encode() + b"\xff\n")
    (bad / "jobs.jsonl").write_text(JOB + json.dumps({"job_id": ESCAPE}) + "\n")
    (bad / "events.jsonl").write_text(json.dumps({"event": "start", "said": ESCAPE}) + "\n")
    moved = bad.rename(bad.with_name(f"bad {ESCAPE}"))
    status = outcome("status", moved)
    assert "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e" in status.stdout
    outcome("status", moved, "--json")
    other_is_shown(runs)
    result = CliRunner().invoke(app, ["logs", str(moved), "--rank", "0"])
    assert result.stdout == "a\tb \\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e\nc \u00e9\ufffd\n"


def test_a_log_that_cannot_be_read_is_named(runs: Path) -> None:
    log = runs / "good/logs/rank-0.log"
    log.unlink(missing_ok=True)
    log.symlink_to("/proc/self/mem")  # reading at its beginning is an input/output error
    with pytest.raises(ConfigError, match=r"rank-0\.log cannot be read \(Input/output error\)"):
        CliRunner().invoke(app, ["logs", str(runs / "good"), "--rank", "0"], catch_exceptions=False)


@pytest.mark.parametrize("order", [1, -1])
def test_the_running_job_of_an_array_stands_for_it(
    order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = (64, 32, 256, 32, 32, 128)
    rows = [
        ("41_[3-5%1]", "PENDING", "", "0", "1-00:00:00", "(JobArrayTaskLimit)"),
        ("41_2", "RUNNING", "node[1-2]", "3", "5:00", "None"),
        ("40", "PENDING", "", "0", "1:00", "(Priority)"),
    ]
    text = "".join(
        "".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + "\n"
        for row in rows[::order]
    )
    (tmp_path / "answer").write_text(text)
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\nexec cat {tmp_path}/answer\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = active_jobs()
    assert found.keys() == {"40", "41"}
    assert (found["41"]["state"], found["41"]["nodes"]) == ("RUNNING", "node[1-2]")


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text(JOB + '{"job_id": "13", "subm')
    JobLog(tmp_path).add("14")
    assert JobLog(tmp_path).job_ids == ["12", "14"]


def test_the_rate_is_that_of_the_recent_steps(tiny_data: Path, tmp_path: Path) -> None:
    """Also where the file is longer than what is read of it."""
    config = write_config(tmp_path, tiny_data, training={"steps": 3000})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(config.read_text())
    lines = [
        {"step": n, "tokens": 256 * n, "loss": float(n), "tokens_per_second": 10.0, "x": "y" * 200}
        | ({"tokens_per_second": 30.0 + n % 2} if n > 980 else {})
        for n in range(1, 1001)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run_status(run_dir, {})
    assert not found.damaged
    assert found.tokens_per_second == pytest.approx(30.5)
    assert found.seconds_left == pytest.approx(2000 * 256 / 30.5)
    assert found.recent_losses == [float(n) for n in range(961, 1001)]


def test_a_log_is_shown_whole_in_blocks_that_cut_characters(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.cli.LOG_BLOCK", 5)
    text = "a line\r\nzwölf Boxkämpfer 🙂\n" * 3
    (runs / "good/logs/rank-0.log").write_bytes(text.encode())
    result = CliRunner().invoke(app, ["logs", str(runs / "good"), "--rank", "0"])
    assert result.stdout == text.replace("\r\n", "\n")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED"])
def test_a_run_that_has_a_job_is_not_submitted_again(
    state: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.submit.active_jobs", lambda: {"12": {"state": state}})
    config = load_config(runs / "good/config.toml")
    with pytest.raises(ConfigError, match=f"is that of job 12, which is {state.lower()}"):
        submit(config, Request("1", 1), ClusterConfig())
    assert submit(config, Request("1", 1, after="12"), ClusterConfig()) == "14"
