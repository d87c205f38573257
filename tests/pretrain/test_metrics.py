"""What a run leaves on record: metrics.jsonl, TensorBoard events, the run directory."""

import gzip
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from checkpoints_tools.folder import resolve
from checkpoints_tools.manifest import read_manifest
from pretrain.config import load_config
from tests.pretrain.command import paragraph, read_metrics, run_command, write_config

FIELDS = {
    "step", "tokens", "samples", "loss", "perplexity", "grad_norm", "lr",
    "tokens_per_second", "model_flops_per_second", "memory_bytes",
    "time_data", "time_forward_backward", "time_step",
}  # fmt: skip
STARTS = [4, 6]  # steps of the first start of the run, and of its second


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """(run directory, seconds) of a run of 4 steps on two ranks that is then extended to 6."""
    folder = tmp_path_factory.mktemp("record")
    begin = time.monotonic()
    for steps in STARTS:
        config = write_config(
            folder, tiny_data, training={"steps": steps}, logging={"tensorboard": True}
        )
        for end in run_command("pretrain", config, ranks=2):
            assert end.code == 0, end.output
        time.sleep(1.1)  # event files are told apart by the second
    return folder / "run", time.monotonic() - begin


def test_every_step_has_sane_metrics(run: tuple[Path, float]) -> None:
    run_dir, wall = run
    entries = read_metrics(run_dir)
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 5, 6]
    spent = 0.0
    for entry in entries:
        assert entry.keys() >= FIELDS
        assert all(math.isfinite(value) for value in entry.values())
        assert entry["tokens"] == entry["step"] * 4 * 64
        assert entry["samples"] == entry["step"] * 4
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
        assert 4 < entry["loss"] < 6.5  # log(300) = 5.7
        assert entry["grad_norm"] > 0
        assert entry["tokens_per_second"] > 0
        assert entry["memory_bytes"] > 2**26
        times = {name: value for name, value in entry.items() if name.startswith("time_")}
        assert all(seconds >= 0 for seconds in times.values())
        step_seconds = 4 * 64 / entry["tokens_per_second"]
        parts = [entry[f"time_{name}"] for name in ("data", "forward_backward", "step")]
        assert 0.5 * step_seconds < sum(parts) <= step_seconds * 1.001
        spent += sum(times.values())
    assert spent < wall


def test_validation_is_recorded_when_due_and_at_the_end(run: tuple[Path, float]) -> None:
    found = {e["step"]: e for e in read_metrics(run[0]) if "validation_loss" in e}
    assert list(found) == [3, 4, 6]  # every 3 steps; 4 was the end of the first start
    for entry in found.values():
        assert entry["validation_perplexity"] == pytest.approx(math.exp(entry["validation_loss"]))
    manifest = read_manifest(resolve(run[0]))  # of the newest checkpoint, for a model card
    loss = found[6]["validation_loss"]
    assert manifest["evaluation"] == {"step": 6, "validation_loss": loss}
    assert manifest["longest_sequence"] == 64


def test_flops_follow_from_the_model_and_the_rate(run: tuple[Path, float]) -> None:
    from parallel.flops import training_flops_per_token

    config = load_config(run[0] / "config.toml")
    per_token = training_flops_per_token(config.model, config.data.seq_len)
    assert per_token > 6 * (config.model.num_params()["total"] - 300 * 32)
    for entry in read_metrics(run[0]):
        expected = pytest.approx(entry["tokens_per_second"] * per_token)
        assert entry["model_flops_per_second"] == expected


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    from pretrain.metrics import MetricsWriter

    writer = MetricsWriter(tmp_path, 0, 1, 1, tensorboard=False)
    writer.write(
        {"step": 1, "loss": math.nan, "perplexity": math.inf, "grad_norm": -math.inf, "lr": 0.1,
         "tokens_per_second": 1.0, "memory_bytes": 1, "validation_loss": math.nan,
         "update_ratio_ssd": math.nan}
    )  # fmt: skip
    writer.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=refuse)
    finite = {name for name, value in entry.items() if value is not None}
    assert finite == {"step", "lr", "tokens_per_second", "memory_bytes"}


def test_tensorboard_holds_the_same_scalars_for_every_step(run: tuple[Path, float]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pretrain.metrics import TENSORBOARD_GROUPS
    from pretrain.records import UTILISATION

    events = EventAccumulator(str(run[0] / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    entries = read_metrics(run[0])
    for name, tag in TENSORBOARD_GROUPS.items():
        expected = {e["step"]: e[name] for e in entries if name in e}
        if not expected:
            assert name in UTILISATION  # of GPUs alone
            continue
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx(expected, rel=1e-6), tag


def test_tensorboard_tells_what_ran_and_when_it_began(run: tuple[Path, float]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()

    def texts(tag: str) -> dict[int, str]:
        found = events.Tensors(f"{tag}/text_summary")
        return {event.step: event.tensor_proto.string_val[0].decode() for event in found}

    assert list(texts("events/starts")) == [0, 4]
    assert "on 2 ranks" in texts("events/starts")[4]
    assert "micro_batch_size = 2" in texts("run/config")[0]
    assert "ssd: torch" in texts("run/kernels")[1]


def test_a_run_is_watched_from_inside_and_elsewhere(tiny_data: Path, tmp_path: Path) -> None:
    watched = {
        "vitals_every": 2, "profile_steps": [3], "wandb_project": "tests",
        "prometheus_file": str(tmp_path / "node/run.prom"),
    }  # fmt: skip
    config = write_config(tmp_path, tiny_data, training={"steps": 4}, logging=watched)
    (end,) = run_command("pretrain", config, before=work_offline)
    assert end.code == 0, end.output
    for entry in read_metrics(tmp_path / "run"):
        assert ("ssd_decay" in entry) == (entry["step"] in (2, 4))
        assert ("update_ratio_attention" in entry) == (entry["step"] in (2, 4))
    last = read_metrics(tmp_path / "run")[-1]
    lines = (tmp_path / "node/run.prom").read_text().splitlines()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}
    assert values["transxssm_step"] == 4
    assert values["transxssm_loss"] == pytest.approx(last["loss"])
    with gzip.open(tmp_path / "run/traces/step-3-rank-0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


def work_offline() -> None:
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"


def test_a_tracker_that_is_not_installed_ends_the_run_before_it_begins(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, logging={"wandb_project": "tests"})
    for end in run_command("pretrain", config, ranks=2, before=forget_wandb):
        assert end.code == 2
        assert "logging.wandb_project='tests' needs the package wandb" in paragraph(end.output)


def forget_wandb() -> None:
    import importlib.util

    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "wandb" else find(name, *rest)


def test_run_directory_is_complete(run: tuple[Path, float]) -> None:
    run_dir = run[0]
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "checkpoints", "checkpoints.json", "config.toml", "environment.json", "events.jsonl",
        "logs", "metrics.jsonl", "tensorboard", "tokenizer.json",
    ]  # fmt: skip
    assert sorted(p.name for p in (run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    log = (run_dir / "logs/rank-0.log").read_text()
    for words in ("2 ranks", "step 1  loss", "resumed from", "done: 6 steps"):
        assert words in log
    assert load_config(run_dir / "config.toml") == load_config(run_dir.parent / "config.toml")


def test_environment_lists_every_start_with_its_packages(run: tuple[Path, float]) -> None:
    starts = json.loads((run[0] / "environment.json").read_text())
    assert len(starts) == len(STARTS)
    for start in starts:
        assert start["world_size"] == 2
        assert start["command"][1:] == ["pretrain", str(run[0].parent / "config.toml")]
        assert {"torch", "deepspeed", "megatron-core", "pydantic"} <= start["packages"].keys()
        assert start["python"]
        assert start["host"]


def rewrite_metrics(run_dir: Path, first_step: int) -> None:
    """Open the record as a run resumed from a step does, and write the step after it."""
    from pretrain.metrics import MetricsWriter

    entry: dict[str, Any] = dict.fromkeys(FIELDS, 1.0) | {"step": first_step + 1}
    writer = MetricsWriter(run_dir, first_step, 10, every=1, tensorboard=False)
    writer.write(entry)
    writer.close()


@pytest.mark.parametrize(
    ("first_step", "tail", "expected"),
    [
        (3, "", [1, 2, 3, 4]),
        (1, "", [1, 2]),
        (0, "", [1]),
        (3, '{"step": 4, "lo', [1, 2, 3, 4]),
        (3, '{"step": 3}', [1, 2, 3, 4]),  # whole, but for its end of line
        (2, "\0\0\0\0\n", [1, 2, 3]),  # as some file systems leave it after a power failure
    ],
    ids=["all", "past-the-checkpoint", "anew", "half-a-line", "no-newline", "zeros"],
)
def test_resume_keeps_what_the_checkpoint_knows(
    first_step: int, tail: str, expected: list[int], tmp_path: Path
) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + tail)
    run_ranks(1, rewrite_metrics, tmp_path, first_step)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == expected


def test_a_step_without_a_loss_is_recorded_as_such(tmp_path: Path) -> None:
    from pretrain.metrics import MetricsWriter

    writer = MetricsWriter(tmp_path, 0, 1, 1, True)
    known = dict.fromkeys(FIELDS, 1.0)
    writer.write(known | {"step": 1, "loss": None, "perplexity": None})
    writer.close()
    (entry,) = read_metrics(tmp_path)
    assert entry["loss"] is None
    assert entry["grad_norm"] == 1.0
