"""Damaged files of a run directory: left out with a word, or one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import bad_steps, failure, lost_checkpoints, metrics, report, run_dir
from pretrain.bad_steps import Judge, read_windows, record_event
from pretrain.config import ConfigError, dump_config, load_config
from pretrain.metrics import MetricsWriter
from pretrain.records import read_starts
from pretrain.report import write_report
from pretrain.sections import TrainingConfig
from slurm.runs import run_status
from tests.tiny import tiny_config
from untrusted.errors import RecordError, UntrustedError

NOT_FILES: dict[str, Callable[[Path], None]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
}
DAMAGED = [
    b"", b"null\n", b"3\n", b'"x"\n', b"[]\n", b"[[]]\n", b"{}\n", b'{"step": "3"}\n', b"\0" * 4096,
    b'{"step": 1.5}\n', b'{"step": -1}\n', b'{"step": true}\n', b'{"step": NaN}\n', b"\xff\xfe\n",
    b'{"step": 1, "loss": "x"}\n', b'{"step": 1, "loss": [1]}\n', b'{"step": 1, "loss": 1e999}\n',
    b'{"step": ' + b"9" * 5000 + b"}\n", b"[" * 100_000 + b"\n", b'[{"time": 3}]\n',
    b'{"event": 3}\n', b'{"event": "start", "step": "x"}\n', b'[[1, "2"]]', b"[[1, 2, 3]]",
]  # fmt: skip
SOUND = {
    "metrics.jsonl": b'{"step": 1, "tokens": 8, "loss": 3.0}\n{"step": 2, "loss": null}\n',
    "events.jsonl": b'{"event": "start", "step": 1, "said": "x"}\n',
    "environment.json": b'[{"time": "t", "host": "h", "world_size": 1, "git_revision": ""}]',
    "skipped_windows.json": b"[[8, 16]]",
}

EMPTY = (b"", b"\0" * 4096)
CUT = b'{"step": 2, "l'
FIRST_LINE = SOUND["metrics.jsonl"].splitlines(keepends=True)[0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.toml").write_text(dump_config(tiny_config(tmp_path, folder)))
    for name, content in SOUND.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are drawn by another test."""
    monkeypatch.setattr(report, "pictures", lambda record: [])


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "environment.json"])
@pytest.mark.usefixtures("draw_nothing")
def test_report_leaves_out_what_is_damaged(
    name: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for content in DAMAGED:
        (run / name).write_bytes(content + (SOUND[name] if name == "metrics.jsonl" else b""))
        write_report(run, run / "report.html")
    for make in NOT_FILES.values():
        (run / name).unlink()
        make(run / name)
        if name == "metrics.jsonl":
            with pytest.raises(ConfigError, match="has no step"):
                write_report(run, run / "report.html")
        else:
            write_report(run, run / "report.html")
        (run / name).rename(run / "damaged") if (run / name).is_dir() else (run / name).unlink()
        (run / name).touch()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "line",
    [
        {"loss": 1e308, "grad_norm": -1e308, "tokens_per_second": 0, "time_data": 1e308},
        {"loss": -1.0, "lr": 0, "validation_loss_from_x": 1.0, "validation_loss_from_": 2.0},
        {"validation_loss_from_0": None, "validation_loss_from_16": 1e300, "ssd_": 2**62},
        {"step": 2**52, "time_step": -5.0, "loss_$x^$": 1.0, "update_ratio_a": 0.0},
        {},
    ],
    ids=str,
)
def test_page_of_strange_numbers(line: dict[str, Any], run: Path) -> None:
    with (run / "metrics.jsonl").open("w") as file:
        for step in (1, 2):
            file.write(json.dumps({"step": step} | line) + "\n")
    assert write_report(run, run / "report.html").exists()


def test_training_records_beside_what_is_damaged(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.log, "propagate", True)
    monkeypatch.setattr(run_dir, "git_revision", str)
    monkeypatch.setattr(run_dir, "distributions", list)
    for content in DAMAGED:
        (run / "environment.json").write_bytes(content)
        run_dir._record_environment(run / "environment.json", 2)
        starts = json.loads((run / "environment.json").read_text())
        assert starts[-1]["world_size"] == 2
        (run / "metrics.jsonl").write_bytes(content + b"\n" + SOUND["metrics.jsonl"] + CUT)
        MetricsWriter(run, 1, 2, 1, tensorboard=False).close()
        assert (run / "metrics.jsonl").read_bytes() == SOUND["metrics.jsonl"].split(b"\n")[
            0
        ] + b"\n"
    assert "environment.damaged.json" in caplog.text
    assert "metrics.damaged.jsonl is a copy" in caplog.text


@pytest.mark.parametrize("make", NOT_FILES.values(), ids=NOT_FILES)
def test_no_place_for_a_record(
    make: Callable[[Path], None], run: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tiny_config(tmp_path, run)
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
        make(run / name)
        with pytest.raises(UntrustedError, match=name):
            run_dir.record_start(config, 1)
        (run / name).rename(tmp_path / name)
        (run / name).touch()
    make(run / "logs/rank-0.log")
    with pytest.raises(UntrustedError, match=r"rank-0\.log"):
        run_dir.start_log(run, 0)
    make(run / "logs" / failure.FILE)
    assert failure.first_failure(run / "logs", 0.0, 0.0) is None
    make(tmp_path / "config.toml")
    with pytest.raises(ConfigError, match="not a file"):
        load_config(tmp_path / "config.toml")
    monkeypatch.setattr(bad_steps.log, "propagate", True)
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").mkdir()
    record_event(run, "straggler", step=1)
    assert "training goes on" in caplog.text


def test_failure_that_is_not_text(run: Path) -> None:
    (run / "logs" / failure.FILE).write_bytes(b"rank 1: \xff\xfe")
    assert (failure.first_failure(run / "logs", 0.0, 0.0) or "").startswith("rank 1: ")


def test_samples_left_out_are_not_forgotten(run: Path) -> None:
    assert read_windows(run) == [(8, 16)]
    for content in set(DAMAGED) - {b"[]\n", *EMPTY}:
        (run / "skipped_windows.json").write_bytes(content)
        with pytest.raises(RecordError, match="remove it to train on the samples"):
            read_windows(run)


@pytest.mark.parametrize("content", EMPTY, ids=["empty", "zeros"])
def test_state_that_a_power_loss_left_empty_counts_as_missing_with_a_word(
    content: bytes, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["environment.json", "skipped_windows.json", "checkpoints.json"]
    for name in names:
        (run / name).write_bytes(content)
    assert read_starts(run) == []
    assert read_windows(run) == []
    assert lost_checkpoints._read_saves(run) is None
    for name in names:
        assert f"{name} is empty, as after a power loss" in caplog.text
    status = run_status(run, {})
    assert status.starts == 0
    assert not status.damaged


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"losses": [float("nan")], "log_norms": [], "bad": []},
        {"losses": ["3"], "log_norms": [], "bad": []},
        {"losses": [], "log_norms": None, "bad": []},
        {"losses": [], "log_norms": [], "bad": [[1, 2]]},
        {"losses": [], "log_norms": [], "bad": [["1", 2, "loss nan"]]},
    ],
    ids=str,
)
def test_spike_history_of_a_checkpoint_has_its_types(state: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="step-00000002: judge"):
        Judge(TrainingConfig()).restore(state, "step-00000002")
