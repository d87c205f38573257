"""Runs whose micro-batches are graphs: the same, digit for digit, whatever happens to them."""

import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.prepare import prepare
from tests.pretrain.command import Ended, read_metrics, run_command, write_config

STEPS = 14
EXACT = ("step", "samples", "loss", "grad_norm", "validation_loss", "skipped_updates", "rollbacks")


def without_norms(steps: list[int], kill_after: int = 0) -> None:
    """The gradient norms of these steps are no numbers; the run dies after a step."""
    from parallel.zero import ZeroOptimizer
    from pretrain.trainer import Trainer

    train_step, grad_norm = Trainer.train_step, ZeroOptimizer.grad_norm
    now = [0]

    def counted(trainer: Trainer, batches: Any) -> dict[str, Any] | None:
        if kill_after and trainer.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        now[0] = trainer.step + 1
        return train_step(trainer, batches)

    def poisoned(zero: ZeroOptimizer) -> torch.Tensor:
        norm = grad_norm(zero)
        return norm * math.nan if now[0] in steps else norm

    Trainer.train_step = counted  # type: ignore[method-assign]
    ZeroOptimizer.grad_norm = poisoned  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two stages: of sequences of 64 tokens, and of 128 with other batch sizes."""
    out = tmp_path_factory.mktemp("long") / "out"
    sources = sorted((Path(__file__).parents[2] / "parallel").glob("*.py"))
    prepare(sources, tiny_data / "tokenizer.json", out, 128, validation_fraction=0)
    return {
        "train": "",
        "sources": [
            {"name": "short", "path": str(tiny_data / "train"), "weight": 1.0},
            {"name": "long", "path": str(out / "train"), "weight": 0.0, "seq_len": 128},
        ],
        "stages": [{"from_tokens": 10 * 8 * 64, "weights": {"long": 1.0}, "global_batch_size": 4}],
    }


def run(folder: Path, data: dict[str, Any], tiny_data: Path, graphs: str, dtype: str) -> list[str]:
    """What a run says that dies, goes on and goes back; with evaluations and vitals."""
    training = {
        "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "eval_every": 4,
        "bad_steps_in_a_row": 3, "cuda_graphs": graphs, "dtype": dtype,
    }  # fmt: skip
    config = write_config(
        folder, tiny_data, data=data, training=training, checkpoint={"every": 2},
        logging={"vitals_every": 5},
    )  # fmt: skip
    ended: list[Ended] = run_command("pretrain", config, before=partial(without_norms, [4], 7))
    assert ended[0].code == -signal.SIGKILL, ended[0].output
    bad = partial(without_norms, [7, 8, 9])
    ended += run_command("pretrain", config, before=bad)
    assert ended[1].code == 0, ended[1].output
    return [end.output for end in ended]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_of_graphs_is_the_run_without(
    dtype: str, data: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    curves = {}
    for graphs in ("off", "on"):
        outputs = run(tmp_path / graphs, data, tiny_data, graphs, dtype)
        lines = read_metrics(tmp_path / graphs / "run")
        curves[graphs] = [{name: line.get(name) for name in EXACT} for line in lines]
        captured = [output.count("captured a graph") for output in outputs]
        if graphs == "on":
            assert captured[0] >= 1
            assert captured[1] >= 2  # of both stages' shapes
            assert not any("cannot be captured" in output for output in outputs)
        else:
            assert captured == [0, 0]
    assert curves["on"] == curves["off"]
    assert curves["on"][-1]["rollbacks"] == 1
    assert curves["on"][-1]["skipped_updates"] >= 3


@pytest.mark.parametrize(
    ("layout", "ranks", "reason"),
    [
        ("--parallel.zero_stage=2", 1, "parallel.zero_stage=2"),
        ("--parallel.pipeline=2", 2, "parallel.pipeline=2"),
        ("--parallel.context=2", 2, "parallel.context=2"),
        ("--parallel.offload=optimizer", 1, "with an offloaded optimizer"),
    ],
)
def test_a_layout_without_graphs_says_so_and_trains(
    layout: str, ranks: int, reason: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, training={"steps": 1, "cuda_graphs": "on"})
    ends = run_command("pretrain", config, layout, ranks=ranks)
    assert [end.code for end in ends] == [0] * ranks, ends[0].output
    assert ends[0].output.count("training.cuda_graphs: micro-batches run eagerly") == 1
    assert reason in ends[0].output
