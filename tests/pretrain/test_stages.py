"""Runs whose stages have other sequence lengths, and several validation sets."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.collate import collate
from data_pipeline.dataset import PackedDataset
from data_pipeline.prepare import prepare
from pretrain.config import Config, ConfigError, load_config
from tests.pretrain.command import read_metrics, run_command, succeed, write_config
from tests.tiny import write_text

STEPS, BATCH, SHORT, LONG = 8, 8, 64, 128


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny data, and the same project's text in sequences of twice the length."""
    out = tmp_path_factory.mktemp("long") / "out"
    sources = sorted((Path(__file__).parents[2] / "parallel").glob("*.py"))
    prepare(sources, tiny_data / "tokenizer.json", out, LONG, validation_fraction=0)
    return {
        "train": "",
        "sources": [
            {"name": "short", "path": str(tiny_data / "train"), "weight": 1.0},
            {"name": "long", "path": str(out / "train"), "weight": 0.0, "seq_len": LONG},
        ],
        # 2.5 steps: from the third on
        "stages": [{"from_tokens": BATCH * SHORT * 5 // 2, "weights": {"long": 1.0}}],
    }


def written(folder: Path, tiny_data: Path, data: dict[str, Any], /, **sections: Any) -> Path:
    training = {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "eval_every": 4}
    sections["training"] = training | sections.pop("training", {})
    sections.setdefault("checkpoint", {"keep_last": 9})
    return write_config(folder, tiny_data, data=data, **sections)


def test_longer_sequences_take_over_on_any_layout_and_after_any_resume(
    data: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, tiny_data, data)
    config = load_config(path)
    assert [(p.first_step, p.first_sample, p.seq_len) for p in config.phases] == [
        (0, 0, SHORT),
        (3, 3 * BATCH, LONG),
    ]
    assert [p.global_batch_size for p in config.phases] == [BATCH, BATCH // 2]
    assert [p.micro_batch_size for p in config.phases] == [2, 1]
    succeed("pretrain", path)
    metrics = read_metrics(tmp_path / "run")
    assert [m["tokens"] for m in metrics] == [BATCH * SHORT * n for n in range(1, STEPS + 1)]
    assert [m["samples"] for m in metrics] == [8, 16, 24, 28, 32, 36, 40, 44]
    assert metrics[-1]["tokens_short"] == 3 * BATCH * SHORT
    assert metrics[-1]["tokens_long"] == 5 * BATCH * SHORT
    assert metrics[-1]["loss_long"] == pytest.approx(metrics[-1]["loss"])
    layouts: list[tuple[int, list[str]]] = [
        (4, ["--parallel.tensor=2", "--parallel.context=2"]),
        (4, ["--parallel.pipeline=2"]),
        (2, ["--parallel.zero_stage=3"]),
    ]
    for number, (ranks, words) in enumerate(layouts):
        run_dir = tmp_path / str(number)
        start = tmp_path / f"run/checkpoints/step-0000000{2 + 2 * (number % 2)}"
        succeed(
            "pretrain", path, f"--logging.run_dir={run_dir}", f"--checkpoint.resume={start}",
            *words, ranks=ranks,
        )  # fmt: skip
        found = {m["step"]: m["loss"] for m in read_metrics(run_dir)}
        for m in metrics[2 + 2 * (number % 2) :]:
            assert found[m["step"]] == pytest.approx(m["loss"], rel=1e-4), words


def test_the_number_of_tokens_decides_when_a_run_of_stages_ends(
    data: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    sizes = [{**data["stages"][0], "global_batch_size": 12, "micro_batch_size": 2}]
    tokens = {"steps": 0, "tokens": 3 * BATCH * SHORT + 12 * LONG + 1}
    config = load_config(written(tmp_path, tiny_data, data | {"stages": sizes}, training=tokens))
    assert config.total_steps == 5
    assert config.total_tokens == 3 * BATCH * SHORT + 2 * 12 * LONG
    assert config.phase_at(4).samples_at(5) == 3 * BATCH + 2 * 12
    assert config.phase_at(2).tokens_at(3) == 3 * BATCH * SHORT
    assert config.phase_at(3).tokens_at(4) == 3 * BATCH * SHORT + 12 * LONG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [{"from_tokens": 1, "weights": {"short": 1.0, "long": 1.0}}]}, "of one length"),
        ({"seq_len": 96}, "set data.seq_len|packed with seq_len|do not divide"),
        ({"stages": [{"from_tokens": 9, "weights": {"long": 1.0}, "global_batch_size": 3}]},
         r"data\.stages from step 1\.global_batch_size=3 is not a multiple"),
        ({"stages": [{"from_tokens": n, "weights": {"long": 1.0}} for n in (5, 9)]},
         "begins in the same step"),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, data: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    def opened() -> Config:
        config = load_config(written(tmp_path, tiny_data, data | change))
        config.data_parallel(2)
        return config

    if "seq_len" in change:
        (end,) = run_command("pretrain", written(tmp_path, tiny_data, data | change))
        assert end.code in (1, 2)
        assert "seq_len" in end.output
        return
    with pytest.raises((ConfigError, ValueError), match=message):
        opened()


def test_validation_sets_have_names(data: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    prepare(write_text(tmp_path / "text", 500), tiny_data / "tokenizer.json", short, SHORT,
            validation_fraction=0)  # fmt: skip
    sets = {"held_out": str(tiny_data / "validation"), "short": str(short / "train")}
    limit = 16
    path = write_config(
        tmp_path, tiny_data, data={"validation": sets}, logging={"tensorboard": True},
        training={"steps": 3, "eval_every": 2, "eval_batches": limit // 4},
    )  # fmt: skip
    succeed("pretrain", path)
    lines = read_metrics(tmp_path / "run")
    last = lines[-1]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 3]
    # of every set so many samples, and no more than it has; a token of any counts as much
    tokens, nats = 0, 0.0
    for name, folder in sets.items():
        dataset = PackedDataset(Path(folder))
        batch = collate([dataset[i] for i in range(min(limit, len(dataset)))])
        count = int(batch.loss_mask.sum())
        tokens, nats = tokens + count, nats + count * last[f"validation_loss_{name}"]
    assert last["validation_loss"] == pytest.approx(nats / tokens, rel=1e-9)
    assert last["validation_loss_short"] != pytest.approx(last["validation_loss"], rel=1e-5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert "validation_by_set/loss_short" in events.Tags()["scalars"]
