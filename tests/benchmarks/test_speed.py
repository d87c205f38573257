"""The speed benchmark at a size that CI has time for: what it measures, and how it adds up."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import speed, speed_tables
from benchmarks.ranks import run_ranks
from benchmarks.rivals import ATTENTION, TRANSXSSM, rival_model
from benchmarks.speed import Options, run
from benchmarks.speed_calls import Problem
from benchmarks.speed_tables import kind, ratios, rival_models, step_seconds
from benchmarks.timing import in_turns
from parallel.config import ModelConfig

PARTS = {
    "attention": [4.0, 5.0, 6.0], "SSD": [2.0, 2.0, 3.0], "head": [0.001, 0.001, 0.002],
    "update": [1e-9, 1e-9, 1e-9],
}  # fmt: skip


def test_a_step_is_the_sum_of_its_parts() -> None:
    problem = Problem("fp32", 1000, 2048)
    models = rival_models(problem, 16)
    parameters = models[TRANSXSSM.name].num_params()["total"]
    found = step_seconds(models[TRANSXSSM.name], problem, PARTS)
    assert found == pytest.approx(14 * 2 + 2 * 5 + 1 + parameters * 1e-9)
    last = step_seconds(models[ATTENTION.name], problem, PARTS, turn=2)
    assert last == pytest.approx(16 * 6 + 2 + models[ATTENTION.name].num_params()["total"] * 1e-9)
    ratio, low, high = speed_tables.training_ratio(problem, 16, PARTS | extra(), TRANSXSSM.name)
    assert low <= ratio <= high


def extra() -> dict[str, list[float]]:
    names = ("SSD, no RoPE", "SSD, convolution", "attention, no RoPE")
    return {name: [1.0, 1.0, 1.0] for name in names}


def test_kinds_of_layers() -> None:
    model = Problem("fp32", 64, 2048).model(8)
    kinds = {
        rival: {kind(found, layer) for layer in range(8)}
        for rival, found in rival_models(Problem("fp32", 64, 2048), 8).items()
    }
    assert kinds[TRANSXSSM.name] == {"SSD", "attention"}
    assert kinds["hybrid, convolution (Jamba)"] == {"SSD, convolution", "attention, no RoPE"}
    assert kinds["hybrid, RoPE in attention"] == {"SSD, no RoPE", "attention"}
    assert rival_model(TRANSXSSM, model) == model


def test_picture_of_a_median_outside_its_turns(tmp_path: Path) -> None:
    speed_tables.draw({"bf16": {64: (1.5, 1.6, 1.7), 128: (1.8, 1.6, 1.7)}}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").exists()


def test_ratios_and_turns() -> None:
    assert ratios([4.0, 6.0, 5.0], [2.0, 2.0, 2.0]) == (2.5, 2.0, 3.0)
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = in_turns(calls, torch.device("cpu"), 2)
    assert order == ["a", "b"] * 3
    assert len(times["a"].seconds) == 2


def small_run(folder: Path) -> tuple[list[int], str]:
    """Exit codes of measuring small models, and again from memory; what was printed at first."""

    def small(problem: Problem, layers: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_layers=layers, num_heads=2,
            num_kv_heads=2, head_dim=64, state_dim=64, ssd_groups=2,
        )  # fmt: skip

    Problem.model = small  # type: ignore[method-assign]
    speed.HUGGING_FACE_TOKENS = 64
    options = Options((64, 128), ("fp32",), (64,), repeats=2, layers=8, threads=1)
    said = io.StringIO()
    codes = [run(options, folder, Console(width=130, file=said))]
    measured = (folder / "results.json").read_text()
    codes.append(run(options, folder, Console(width=130, file=io.StringIO())))
    assert (folder / "results.json").read_text() == measured
    (folder / "results.json").write_text('{"setting": {"device": "another"}}')
    codes.append(run(options, folder, Console(width=130, file=io.StringIO())))
    return codes, said.getvalue()


def test_the_whole_way_once_and_from_memory(tmp_path: Path) -> None:
    ((codes, said),) = run_ranks(1, small_run, tmp_path)
    assert codes[0] in (0, 1)  # at this size it says nothing of the model
    assert codes[1:] == [codes[0], 2]  # measurements of another machine are not mixed in
    for words in ("TransXSSM", "attention (Llama)", "SSD, RoPE", "8 layers whole",
                  "after 128 tokens", "Bamba (Mamba-2 hybrid)"):  # fmt: skip
        assert words in said, said
    assert (tmp_path / "speed.png").read_bytes()[1:4] == b"PNG"
