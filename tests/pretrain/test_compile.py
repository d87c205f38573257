"""Runs whose layers are compiled."""

from pathlib import Path

import pytest

from tests.pretrain.command import paragraph, read_metrics, run_command, write_config


def test_a_compiled_run_trains_evaluates_looks_at_layers_and_resumes(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Within rounding of an eager run, and its graphs, which a CPU cannot record, give way."""
    metrics = []
    for compiled in ("none", "layers"):
        config = write_config(
            tmp_path / compiled, tiny_data,
            training={"compile": compiled, "dtype": "fp32", "micro_batch_size": 2},
            logging={"vitals_every": 2},
        )  # fmt: skip
        (ended,) = run_command("pretrain", config, "--training.cuda_graphs=on")
        assert ended.code == 0, ended.output
        assert ended.output.count("a CPU cannot record") == (compiled == "layers")
        (ended,) = run_command("pretrain", config, "--training.steps=8")
        assert ended.code == 0, ended.output
        metrics.append(read_metrics(tmp_path / compiled / "run"))
    eager, compiled_steps = metrics
    assert len(eager) == len(compiled_steps) == 8
    for one, other in zip(eager, compiled_steps, strict=True):
        assert other.keys() == one.keys()
        for key in ("loss", "grad_norm", "validation_loss"):
            if one.get(key) is not None:
                assert other[key] == pytest.approx(one[key], rel=1e-4), (one["step"], key)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("--parallel.tensor=2", "parallel.tensor=2"),
        ("--parallel.context=2", "parallel.context=2"),
        ("--parallel.zero_stage=3", "parallel.zero_stage=3"),
    ],
)
def test_layouts_that_communicate_within_layers_are_refused(
    override: str, field: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, training={"compile": "layers"})
    (ended,) = run_command("pretrain", config, override)
    assert ended.code == 2
    assert f'training.compile="layers" with {field}' in paragraph(ended.output)
    assert not (tmp_path / "run").exists()
