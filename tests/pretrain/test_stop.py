"""Runs that are told to stop: saved within a step, on every rank, and gone on with digit for
digit."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import folder as folders
from pretrain import stop
from tests.pretrain.command import at_step, read_metrics, run_command, succeed, write_config
from tests.pretrain.test_run import curve

SECTIONS: dict[str, Any] = {
    "training": {"steps": 6, "eval_every": 3, "eval_batches": 3},
    "checkpoint": {"every": 0},
}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_in_evaluation(number: int) -> None:
    from pretrain import validation

    evaluate = validation.evaluate

    def slow(*words: Any) -> Any:
        send(number)
        time.sleep(0.1)
        return evaluate(*words)

    validation.evaluate = slow


def signal_while_data_stalls(number: int, only_rank: int) -> None:
    """From sample 12 on, a rank's data never comes."""
    from data_pipeline.blend import Blend

    if os.environ.get("RANK", "0") != str(only_rank):
        return
    read = Blend.read

    def stalled(blend: Blend, counters: Any) -> Any:
        if counters[0] >= 12:
            threading.Timer(0.5, send, [number]).start()
            time.sleep(600)
        return read(blend, counters)

    Blend.read = stalled  # type: ignore[method-assign]


def signal_at_the_start(number: int) -> None:
    from pretrain import job

    open_data = job.open_data

    def signalled(*words: Any) -> Any:
        send(number)
        time.sleep(10)
        return open_data(*words)

    job.open_data = signalled


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    succeed("pretrain", write_config(folder, tiny_data, **SECTIONS))
    return folder / "run"


@pytest.mark.parametrize(
    ("ranks", "fault", "saved"),
    [
        (1, partial(at_step, 2, 0, partial(send, signal.SIGTERM)), 2),
        (2, partial(at_step, 4, 1, partial(send, signal.SIGUSR1)), 4),
        (1, partial(signal_in_evaluation, signal.SIGUSR1), 3),
        (2, partial(signal_while_data_stalls, signal.SIGUSR1, 1), 3),
    ],
    ids=["TERM", "USR1-on-one-rank", "in-evaluation", "while-data-stalls"],
)
def test_stopped_run_saves_within_a_step_and_goes_on_digit_for_digit(
    ranks: int, fault: Any, saved: int, whole: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, **SECTIONS)
    for end in run_command("pretrain", config, ranks=ranks, before=fault):
        assert end.code == stop.REQUEUE, end.output
        assert end.seconds < 20
    assert folders.committed_steps(tmp_path / "run/checkpoints") == [saved]
    # the step of an evaluation that was broken off is reported by the run that makes it
    reported = [e["step"] for e in read_metrics(tmp_path / "run")]
    assert reported == [s for s in range(1, saved + 1) if not (ranks == 1 and s == saved == 3)]
    succeed("pretrain", config, ranks=ranks)
    if ranks == 1:
        assert curve(tmp_path / "run") == curve(whole)
    else:
        losses = [e["loss"] for e in read_metrics(tmp_path / "run")]
        assert losses == pytest.approx([e["loss"] for e in read_metrics(whole)], rel=1e-6)


def test_signal_before_there_is_anything_to_save(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    for number, code in ((signal.SIGUSR1, stop.REQUEUE), (signal.SIGTERM, 143)):
        (end,) = run_command("pretrain", config, before=partial(signal_at_the_start, number))
        assert end.code == code, end.output
        assert end.seconds < 8


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5:03\n", 303.0), ("59", 59.0), ("1:00:00", 3600.0), ("2-01:00:30", 176430.0),
        ("UNLIMITED", None), ("NOT_SET", None), ("INVALID", None), ("", None), ("-0:07", -7.0),
        ("1" * 400, None), ("1" * 5000, None), ("٣:٠٠", None), ("1-" + "9" * 400, None),
    ],
)  # fmt: skip
def test_times_of_squeue(text: str, seconds: float | None) -> None:
    assert stop.parse_time(text) == seconds
