"""How every start of a run ended is recorded, and status, runs and report say so."""

import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain import starts, stop
from pretrain.cli import app
from pretrain.config import load_config
from pretrain.report import write_report
from pretrain.run_dir import record_start
from pretrain.starts import record_began, record_ended
from slurm.runs import run_status
from tests.pretrain.command import at_step, run_command, write_config
from tests.pretrain.test_bad_steps import poison


def raise_at(step: int, rank: int) -> None:
    """A fault of the program itself."""

    def fail() -> None:
        raise RuntimeError("an unforeseen fault")

    at_step(step, rank, fail)


def signal_at(step: int, number: int) -> None:
    at_step(step, 0, lambda: os.kill(os.getpid(), number))


def signal_before_training() -> None:
    """While the model is built."""
    from pretrain import job

    def configured(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    job.Trainer = configured  # type: ignore[assignment,misc]


@pytest.mark.parametrize(
    ("before", "ranks", "state", "ended", "failure"),
    [
        (None, 1, "finished", "done (step 6 of 6)", None),
        (partial(signal_at, 3, signal.SIGTERM), 1, "stopped", "stopped (SIGTERM, all saved)", None),
        (signal_before_training, 1, "stopped", "stopped (SIGTERM before there was anything", None),
        (partial(signal_at, 3, signal.SIGKILL), 1, "killed", None, None),
        (partial(poison, [3], math.nan, 0), 1, "failed", "failed (step 3: loss nan", "step 3: l"),
        (partial(raise_at, 3, 0), 1, "failed", "failed (RuntimeError: an unforeseen", "RuntimeE"),
        (partial(raise_at, 3, 1), 2, "failed", "failed (rank 1 on ", "rank 1 on"),
    ],
    ids=["done", "signal", "signal-early", "killed", "nan", "bug", "bug-of-rank-1"],
)  # fmt: skip
def test_the_end_of_a_start_is_recorded_and_shown(
    before: Callable[[], None] | None, ranks: int, state: str, ended: str | None,
    failure: str | None, tiny_data: Path, tmp_path: Path,
) -> None:  # fmt: skip
    training = {"eval_every": 0, "on_bad_step": "stop"}
    config = write_config(tmp_path, tiny_data, training=training)
    first, *_ = run_command("pretrain", config, ranks=ranks, before=before)
    if "nan" in (ended or ""):
        assert first.output.count("stopped before the update") == 1
    run_dir = tmp_path / "run"
    events = [json.loads(line) for line in (run_dir / "events.jsonl").open()]
    assert [event["event"] for event in events if event["event"] in ("start", "end")] == [
        "start", *(["end"] if ended else []),
    ]  # fmt: skip
    found = run_status(run_dir, {})
    assert found.state == state
    assert (found.ended or "").startswith(ended or "")
    assert (found.failure or "").startswith(failure or "")
    assert bool(found.failure) == bool(failure)
    shown = CliRunner().invoke(app, ["status", str(run_dir)]).stdout
    listed = CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout
    for words in (state, *([ended] if ended else [])):
        assert words in shown
        assert words in listed
    if ended and (run_dir / "metrics.jsonl").exists():
        page = write_report(run_dir, tmp_path / "report.html").read_text()
        assert page.count(ended) == 1  # among the facts
        assert "<td>end</td>" in page


def test_a_rollback_is_no_start(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, training={"steps": 10, "eval_every": 0})
    (end,) = run_command("pretrain", config, before=partial(poison, [6, 7, 8], math.nan, 0))
    assert end.code == 0, end.output
    events = [json.loads(line)["event"] for line in (tmp_path / "run/events.jsonl").open()]
    assert events.count("rollback") == 1
    assert events.count("start") == run_status(tmp_path / "run", {}).starts == 1


def test_only_the_process_that_began_a_start_ends_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "_open", None)
    monkeypatch.setattr(stop, "_report", None)
    record_ended("failed", "refused before it began")
    assert not list(tmp_path.iterdir())
    record_began(tmp_path, 3, "begins after step 3")
    assert starts._open is not None
    monkeypatch.setattr(starts, "_open", (tmp_path, os.getpid() + 1))  # as in a forked child
    record_ended("failed", "a child's")
    monkeypatch.setattr(starts, "_open", (tmp_path, os.getpid()))
    record_ended("stopped", "SIGINT")
    record_ended("failed", "afterwards")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    assert [(event["event"], event.get("how")) for event in events] == [
        ("start", None), ("end", "stopped"),
    ]  # fmt: skip


def test_the_length_of_a_run_counts_the_batches_it_has_had(tiny_data: Path, tmp_path: Path) -> None:
    """Four steps of 8 sequences, then as many tokens as six make: by the new batch four in all."""
    config = write_config(tmp_path, tiny_data, training={"steps": 4, "eval_every": 0})
    (end,) = run_command("pretrain", config)
    assert end.code == 0, end.output
    tokens = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["tokens"]
    batch = load_config(config).training.global_batch_size
    longer = ["--training.tokens", str(tokens * 2), "--training.global_batch_size", str(batch // 2)]
    (end,) = run_command("pretrain", config, *longer)
    assert end.code == 0, end.output
    status = run_status(tmp_path / "run", {})
    assert (status.step, status.total_steps, status.state) == (12, 12, "finished")
    last = json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[-1])
    assert last["said"] == "step 12 of 12"


def test_a_stopped_run_is_shown_at_the_step_it_has_saved(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that step's metrics wait for their evaluation."""
    monkeypatch.setattr(starts, "_open", None)
    monkeypatch.setattr(stop, "_report", None)
    config = write_config(tmp_path, tiny_data, training={"steps": 4})
    (tmp_path / "run/logs").mkdir(parents=True)
    record_start(load_config(config), 1)
    record_ended("stopped", "SIGTERM, all saved", step=3)
    assert run_status(tmp_path / "run", {}).step == 3
