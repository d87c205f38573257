"""Losses and gradients that are not finite, and spikes: left out, gone back from, reported."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_tools import folder as folders
from pretrain.bad_steps import Judge, passed_to, read_windows
from pretrain.lost_checkpoints import keep_record, record_saves
from pretrain.resume import go_back
from pretrain.sections import TrainingConfig
from tests.checkpoints_tools.test_folder import CutOffError, cut_off_at, save
from tests.pretrain.command import Ended, paragraph, read_metrics, run_command, write_config
from tests.pretrain.test_run import curve, die_after_save, stored_tensors
from tests.tiny import tiny_config


def poison(steps: list[int], factor: float, only_rank: int) -> None:
    """A rank's losses, and with them all gradients, are so many times too large in these steps."""
    from parallel.model import PipelineStage
    from pretrain.trainer import Trainer

    train_step, forward = Trainer.train_step, PipelineStage.forward
    now = [0]

    def counted(trainer: Trainer, batches: Any) -> dict[str, Any] | None:
        now[0] = trainer.step + 1
        return train_step(trainer, batches)

    def poisoned(stage: PipelineStage, *words: Any) -> Any:
        output = forward(stage, *words)
        if now[0] in steps and os.environ.get("RANK", "0") == str(only_rank):
            return tuple(part * factor for part in output)
        return output

    Trainer.train_step = counted  # type: ignore[method-assign]
    PipelineStage.forward = poisoned  # type: ignore[method-assign]


def die_when_going_back(steps: list[int]) -> None:
    from pretrain.trainer import Trainer

    poison(steps, math.nan, 0)

    def fatal(trainer: Trainer, start: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Trainer.resume = fatal  # type: ignore[method-assign]


def train(
    folder: Path, data: Path, steps: list[int], factor: float = math.nan, ranks: int = 1,
    **sections: dict[str, Any],
) -> tuple[Path, list[Ended]]:  # fmt: skip
    """The configuration, and how a run with these bad steps ended."""
    training = {"steps": 10, "eval_every": 0} | sections.pop("training", {})
    config = write_config(folder, data, training=training, **sections)
    before = partial(poison, steps, factor, ranks - 1)
    return config, run_command("pretrain", config, ranks=ranks, before=before)


def events(run_dir: Path) -> list[str]:
    found = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").open()]
    return [event for event in found if event not in ("start", "end")]


@pytest.mark.parametrize(
    ("ranks", "parallel", "dtype"),
    [
        (1, {}, "fp32"),
        (2, {"zero_stage": 1}, "bf16"),
        (2, {"zero_stage": 2}, "bf16"),
        (2, {"zero_stage": 3}, "fp32"),
        (2, {"tensor": 2}, "fp32"),
        (2, {"pipeline": 2}, "bf16"),
    ],
)
def test_update_of_a_bad_step_leaves_the_state_as_it_is(
    ranks: int, parallel: dict[str, Any], dtype: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Numbers that one rank alone meets first."""
    training = {"steps": 3, "dtype": dtype}
    _, ends = train(tmp_path, tiny_data, [3], ranks=ranks, training=training, parallel=parallel)
    assert [end.code for end in ends] == [0] * ranks, ends[0].output
    before, after = (
        stored_tensors(folders.step_folder(tmp_path / "run/checkpoints", step)) for step in (2, 3)
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [0, 0, 1]
    assert lines[-1]["loss"] is None
    assert events(tmp_path / "run") == ["update skipped"]


def poison_and_die(steps: list[int], after: int) -> None:
    """The run has steps without a number, and dies after a later save."""
    poison(steps, math.nan, 0)
    die_after_save(after)


def test_spike_is_left_out_and_nothing_else(tiny_data: Path, tmp_path: Path) -> None:
    """Also when the good steps before it were made by a run that died."""
    training = {"steps": 16, "spike_window": 8, "eval_every": 0}
    config = write_config(tmp_path, tiny_data, training=training)
    (end,) = run_command("pretrain", config, before=partial(poison_and_die, [5], 10))
    assert end.code == -signal.SIGKILL, end.output
    (end,) = run_command("pretrain", config, before=partial(poison, [12], 50.0, 0))
    assert end.code == 0, end.output
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [0] * 4 + [1] * 7 + [2] * 5
    assert lines[11]["loss"] > 100
    assert "usually" in (tmp_path / "run/events.jsonl").read_text()
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000016/manifest.json").read_text())
    assert manifest["adam_step"] == 14
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert saved == ["step-00000010", "step-00000014", "step-00000016"]  # none of a bad step


def test_run_goes_back_and_passes_over_what_was_bad(tiny_data: Path, tmp_path: Path) -> None:
    """Also when it dies while it goes back."""
    _, (end,) = train(tmp_path / "a", tiny_data, [6, 7, 8])
    assert end.code == 0, end.output
    run = tmp_path / "a/run"
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 9, 10]
    assert json.loads((run / "skipped_windows.json").read_text()) == [[20, 32]]
    assert read_metrics(run)[-1]["samples"] == 40
    assert read_metrics(run)[-1]["rollbacks"] == 1

    killed = write_config(tmp_path / "b", tiny_data, training={"steps": 10, "eval_every": 0})
    (end,) = run_command("pretrain", killed, before=partial(die_when_going_back, [6, 7, 8]))
    assert end.code == -signal.SIGKILL
    (end,) = run_command("pretrain", killed, before=partial(poison, [6, 7, 8], math.nan, 0))
    assert end.code == 0, end.output
    assert curve(tmp_path / "b/run") == curve(run)


def stop_among_bad_steps(steps: list[int], last: int) -> None:
    """The run is asked to stop, and saves, after some bad steps in a row."""
    from pretrain import stop
    from pretrain.trainer import Trainer

    poison(steps, math.nan, 0)
    train_step = Trainer.train_step

    def stopping(trainer: Trainer, batches: Any) -> dict[str, Any] | None:
        if trainer.step == last:
            stop.request("SIGUSR1")
        return train_step(trainer, batches)

    Trainer.train_step = stopping  # type: ignore[method-assign]


def test_run_that_stops_among_bad_steps_has_what_to_go_back_to(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Though it keeps one checkpoint only."""
    training = {"steps": 10, "eval_every": 0}
    saves = {"keep_last": 1}
    config = write_config(tmp_path, tiny_data, training=training, checkpoint=saves)
    stopping = partial(stop_among_bad_steps, [6, 7, 8], 7)
    (end,) = run_command("pretrain", config, before=stopping)
    assert end.code == 85, end.output
    assert folders.committed_steps(tmp_path / "run/checkpoints") == [4, 7]
    (end,) = run_command("pretrain", config, before=partial(poison, [6, 7, 8], math.nan, 0))
    assert end.code == 0, end.output
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 9, 10]
    assert folders.committed_steps(tmp_path / "run/checkpoints") == [10]


def test_without_a_checkpoint_from_before_bad_steps_none_is_removed(
    tiny_data: Path, tmp_path: Path
) -> None:
    """A start with other settings may still go on from what there is."""
    training = {"steps": 10, "eval_every": 0, "bad_steps_in_a_row": 4}
    config = write_config(tmp_path, tiny_data, training=training)
    stopping = partial(stop_among_bad_steps, [2, 3, 4, 5], 4)
    (end,) = run_command("pretrain", config, "--checkpoint.every=0", before=stopping)
    assert end.code == 85, end.output
    (end,) = run_command("pretrain", config, before=partial(poison, [5], math.nan, 0))
    assert end.code == 1, end.output
    assert "There is no checkpoint from before to go back to" in paragraph(end.output)
    assert folders.committed_steps(tmp_path / "run/checkpoints") == [4]


def test_going_back_that_is_cut_off_anywhere_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    number, ended, excluded = 0, False, []
    while not ended:
        config = tiny_config(tmp_path, tmp_path / str(number))
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "metrics.jsonl").write_text('{"step": 7}\n')
        for step in (2, 4, 7):
            save(config.checkpoint_dir, step, "whole")
        record_saves(config)
        start = folders.step_folder(config.checkpoint_dir, 4)
        with pytest.MonkeyPatch.context() as patch:
            cut_off_at(number, patch, [])
            try:
                go_back(config, start, 5, [(20, 32)])
                ended = True
            except CutOffError:
                pass
        folders.remove_temporary(config.checkpoint_dir)  # as the next start does
        steps = folders.committed_steps(config.checkpoint_dir)
        keep_record(config, steps)  # finds nothing lost
        assert steps in ([2, 4, 7], [2, 4])
        excluded.append(read_windows(Path(config.logging.run_dir)))
        assert excluded[-1] or steps == [2, 4, 7]
        number += 1
    assert number > 10
    assert excluded[0] == []
    assert excluded[-1] == [(20, 32)]


def test_run_ends_with_a_report_after_so_many_times(tiny_data: Path, tmp_path: Path) -> None:
    training = {"max_rollbacks": 2, "bad_steps_in_a_row": 1}
    _, ends = train(tmp_path, tiny_data, [5, 6, 7, 8], ranks=2, training=training)
    for end in ends:
        assert end.code == 1
        said = paragraph(end.output)
        assert "gone back 2 times, as often as training.max_rollbacks allows" in said
        assert "samples [16, 20), [20, 24)" in said
    assert events(tmp_path / "run").count("rollback") == 2


def test_run_that_is_to_stop_at_a_bad_step_does(tiny_data: Path, tmp_path: Path) -> None:
    _, (end,) = train(tmp_path, tiny_data, [3], training={"on_bad_step": "stop"})
    assert end.code == 1
    assert "step 3: loss nan; stopped before the update" in paragraph(end.output)
    assert folders.committed_steps(tmp_path / "run/checkpoints") == [2]


@given(
    st.lists(st.floats(0.5, 2.0), min_size=16, max_size=40),
    st.floats(1e3, 1e30),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_judge(losses: list[float], large: float, bad: float) -> None:
    judge = Judge(TrainingConfig(spike_window=16))
    for loss in losses:
        assert judge.fault(bad, 1.0) == f"loss {bad}"
        assert judge.fault(1.0, bad) == f"gradient norm {bad}"
        if len(judge.losses) < 16:
            assert judge.fault(large, large) is None
        judge.good(loss, loss)
    assert judge.fault(large, 1.0) is not None
    assert judge.fault(1.0, large * 1e6) is not None
    assert judge.fault(0.0, 0.0) is None
    other = Judge(TrainingConfig(spike_window=16))
    other.restore(json.loads(json.dumps(judge.state())), "step-00000001")
    assert other.state() == judge.state()


@pytest.mark.parametrize("losses", [
    [1.0, 2.0, 2.5, 3.0, 4.0, 4.25, 60.0, 90.0],
    [5.0, 5.0, 5.5, 6.5, 7.0, 9.0, 400.0, 5.25],
    [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 50.0],
], ids=["two outliers", "one outlier", "equal"])  # fmt: skip
def test_limit_is_so_many_robust_deviations_above_the_median(losses: list[float]) -> None:
    """Outliers among the good steps neither raise it nor widen it."""

    def middle(numbers: list[float]) -> float:
        ordered = sorted(numbers)
        return (ordered[3] + ordered[4]) / 2

    for name in ("loss", "gradient norm"):
        judge = Judge(TrainingConfig(spike_window=8, spike_deviations=7.0))
        for loss in losses:
            judge.good(*((loss, 1.0) if name == "loss" else (1.0, math.exp(loss / 10))))
        numbers = losses if name == "loss" else [loss / 10 for loss in losses]
        usual = middle(numbers)
        deviation = 1.4826 * middle([abs(number - usual) for number in numbers])
        limit = usual + 7 * max(deviation, 0.01 * usual, 0.01)
        for factor, is_bad in ((0.999, False), (1.001, True)):
            number = limit * factor
            fault = (
                judge.fault(number, 1.0) if name == "loss" else judge.fault(1.0, math.exp(number))
            )
            assert (fault is not None) == is_bad, (name, factor)
            assert fault is None or fault.startswith(name)


def test_a_good_step_ends_a_row_of_bad_ones() -> None:
    judge = Judge(TrainingConfig())
    judge.bad.append((3, 24, "loss nan"))
    judge.good(1.0, 1.0)
    assert not judge.bad


def test_windows_that_touch_are_passed_over_at_once() -> None:
    windows = [(20, 30), (8, 12), (12, 20)]
    assert [passed_to(sample, windows) for sample in (7, 8, 13, 29, 30)] == [7, 30, 30, 30, 30]
