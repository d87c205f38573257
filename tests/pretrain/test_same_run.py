"""What may change when a run goes on: batch size and weights from the next sample on, exactly."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_tools.errors import CheckpointError
from data_pipeline.config import DataConfig
from pretrain.config import Config, load_config
from pretrain.phases import Phase, continued_phases, length, run_phases
from pretrain.same_run import Start, check_same_run
from pretrain.sources import blend, open_blend
from tests.pretrain.command import read_metrics, run_command, succeed, write_config
from tests.pretrain.test_run import curve, die_after_save

STEP_2 = "run/checkpoints/step-00000002"
SOURCES = [{"path": "x", "name": "web"}, {"path": "y", "name": "books"}]


def data(weights: tuple[float, float], *stages: dict[str, Any]) -> DataConfig:
    sources = [s | {"weight": w} for s, w in zip(SOURCES, weights, strict=True)]
    return DataConfig.model_validate({"sources": sources, "stages": list(stages), "seq_len": 10})


# -- phases ----------------------------------------------------------------------------------------


def test_unchanged_settings_give_the_same_phases() -> None:
    stage = {"from_tokens": 500, "weights": {"web": 1.0}, "global_batch_size": 16}
    config = data((0.7, 0.3), stage)
    made = run_phases(config, 8, 4)
    for step in range(12):
        assert continued_phases(made, config, 8, 4, step) == made, step


def test_changes_begin_with_the_next_step_and_stay_where_they_began() -> None:
    made = run_phases(data((0.7, 0.3)), 8, 4)
    changed = data((0.5, 0.5), {"from_tokens": 1000, "weights": {"books": 1.0}})
    once = continued_phases(made, changed, 16, 4, 5)
    assert once == [
        Phase(0, 0, 0, 10, 8, 4, (0.7, 0.3)),
        Phase(5, 40, 400, 10, 16, 4, (0.5, 0.5)),
        Phase(9, 104, 1040, 10, 16, 4, (0.0, 1.0)),
    ]
    for step in range(5, 14):
        assert continued_phases(once, changed, 16, 4, step) == once, step
    again = continued_phases(once, changed, 4, 4, 7)  # and once more
    assert again[:2] == once[:2]
    assert again[2] == Phase(7, 72, 720, 10, 4, 4, (0.5, 0.5))
    assert again[3] == Phase(14, 100, 1000, 10, 4, 4, (0.0, 1.0))
    assert length(again, 20, 0) == (20, 1240)
    assert length(again, 0, 1100) == (17, 1120)


def test_micro_batch_size_is_no_phase() -> None:
    made = run_phases(data((0.7, 0.3)), 8, 4)
    (phase,) = continued_phases(made, data((0.7, 0.3)), 8, 2, 5)
    assert phase == Phase(0, 0, 0, 10, 8, 2, (0.7, 0.3))


# -- a checkpoint and a configuration --------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps over two sources."""
    folder = tmp_path_factory.mktemp("ended")
    sources = [{"path": str(tiny_data / "train"), "name": "web", "weight": 0.7},
               {"path": str(tiny_data / "validation"), "name": "books", "weight": 0.3}]  # fmt: skip
    config = write_config(
        folder, tiny_data, data={"train": "", "sources": sources},
        training={"steps": 2, "eval_every": 0},
        optimizer={"schedule": "wsd", "decay_fraction": 0.5, "warmup_fraction": 0.0},
    )  # fmt: skip
    succeed("pretrain", config)
    return folder


@pytest.fixture
def start(
    ended: Path, caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[Start, Config, str]]:
    """What a start after step 2 with other settings comes to, and what it says."""

    def check(*words: str, weights: tuple[str, str] = ("0.7", "0.3")) -> tuple[Start, Config, str]:
        text = (ended / "config.toml").read_text()
        changed = text.replace("weight = 0.7", f"weight = {weights[0]}")
        (ended / "changed.toml").write_text(
            changed.replace("weight = 0.3", f"weight = {weights[1]}")
        )
        config = load_config(ended / "changed.toml", list(words))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found = check_same_run(ended / STEP_2, config, open_blend(config))
        return found, config, caplog.text

    return check


Check = Callable[..., tuple[Start, Config, str]]


def test_batch_size_and_weights_may_change_and_are_named(start: Check) -> None:
    """And what was read before is not read again, nor left out."""
    found, config, log = start(
        "--training.steps=9", "--training.global_batch_size=8", weights=("0.5", "0.5")
    )
    changes = "global_batch_size: 4 → 8; weights: web 0.7 → 0.5, books 0.3 → 0.5"
    assert found.changes == changes
    assert f"from step 3 (sample 8) on: {changes}" in log
    assert "another data" not in log
    before, now = open_blend(load_config(config_file(config))), None
    now = blend(before.sources, config.with_phases(found.phases))
    for old, new in zip(before.order.locate(np.arange(8)), now.order.locate(np.arange(8)),
                        strict=True):  # fmt: skip
        assert (old == new).all()
    sources, indices = now.order.locate(np.arange(400))
    for source in (0, 1):
        own = indices[sources == source]
        first_epoch = own[: len(before.sources[source])]
        assert len(set(first_epoch.tolist())) == len(first_epoch)


def config_file(config: Config) -> Path:
    return Path(config.logging.run_dir).parent / "config.toml"


def test_unchanged_configuration_says_nothing(start: Check) -> None:
    found, _, log = start("--training.steps=2")
    assert found.changes == ""
    assert found.has_ended
    assert log == ""


def test_extended_wsd_run_says_what_the_learning_rate_will_do(start: Check) -> None:
    _, _, log = start("--training.steps=20")
    assert "the learning rate was 0.0001 at step 2 and is 0.001 at step 3" in log
    assert "stays at 0.001 up to step 10, and then falls to 0.0001 at step 20" in log


def test_other_rate_is_reported_with_the_step(start: Check) -> None:
    _, _, log = start("--training.steps=20", "--optimizer.schedule=cosine", "--optimizer.lr=0.01")
    assert "the learning rate was 0.0001 at step 2 and is 0.009" in log
    assert "falls to 0.001 at step 20" in log


def test_source_that_is_another_is_named(start: Check, ended: Path, tiny_data: Path) -> None:
    text = (ended / "config.toml").read_text()
    path = str(tiny_data / "validation")
    other = ended / "other"
    shutil.copytree(tiny_data / "train", other, dirs_exist_ok=True)
    config = ended / "swapped.toml"
    config.write_text(text.replace(f'path = "{path}"', f'path = "{other}"'))
    loaded = load_config(config)
    with pytest.raises(CheckpointError, match=f"data of {other}: .*allow_data_change") as raised:
        check_same_run(ended / STEP_2, loaded, open_blend(loaded))
    assert f"data of {tiny_data / 'train'}" not in str(raised.value)


def test_checkpoint_that_has_read_no_data_goes_on_with_any(ended: Path, tmp_path: Path) -> None:
    """Imported for no data in particular, or averaged: the order of samples is the new run's."""
    model = tmp_path / "model"
    succeed("checkpoint", "export", ended / STEP_2, model, "--no-verify")
    succeed("checkpoint", "import", model, tmp_path / "imported")
    other = shutil.copytree(ended / STEP_2, tmp_path / "other/step-00000002")
    succeed("checkpoint", "average", ended / STEP_2, other, "--out", tmp_path / "mean")
    words = ["--data.seed=7", "--data.shuffle_window=8192"]
    words += ["--training.global_batch_size=8", "--training.steps=2"]
    config = load_config(ended / "config.toml", words)
    for made in ("imported", "mean"):
        start = check_same_run(tmp_path / made / "step-00000000", config, open_blend(config))
        assert (start.phases, start.has_ended) == (config.phases, False)
        (end,) = run_command(
            "pretrain", ended / "config.toml", *words,
            f"--logging.run_dir={tmp_path / 'run' / made}",
            f"--checkpoint.resume={tmp_path / made}",
        )  # fmt: skip
        assert end.code == 0, end.output
        tokens = [line["tokens"] for line in read_metrics(tmp_path / "run" / made)]
        assert tokens == [8 * 64, 2 * 8 * 64]


@pytest.mark.parametrize(
    ("change", "is_offered"),
    [
        ("--model.rope_theta=500.0", True),
        ('--model.rope="none"', True),
        ("--model.rms_norm_eps=1e-5", True),
        ("--model.intermediate_size=128", False),
        ("--model.num_layers=6", False),
        ("--model.attn_layer_offset=0", False),
        ("--model.tie_word_embeddings=false", False),
    ],
)
def test_model_change_is_offered_only_where_it_can_help(
    change: str, is_offered: bool, start: Check
) -> None:
    with pytest.raises(CheckpointError) as raised:
        start("--training.steps=3", change)
    assert ("--checkpoint.allow_model_change true" in str(raised.value)) == is_offered
    assert change.removeprefix("--").partition("=")[0] in str(raised.value)


# -- whole runs ------------------------------------------------------------------------------------


def test_changed_run_is_the_same_however_often_it_is_interrupted(
    ended: Path, tiny_data: Path, tmp_path: Path
) -> None:
    words = ["--training.steps=8", "--training.global_batch_size=8", "--optimizer.lr=0.002"]
    text = (ended / "config.toml").read_text().replace("weight = 0.7", "weight = 0.1")
    curves = []
    for name in ("whole", "killed"):
        run = tmp_path / name / "run"
        shutil.copytree(ended / "run", run)
        (tmp_path / name / "config.toml").write_text(text)
        options = [*words, f"--logging.run_dir={run}"]
        command = ["pretrain", str(tmp_path / name / "config.toml"), *options]
        if name == "killed":
            run_command(*command, before=partial(die_after_save, 4))
            assert not (run / "checkpoints/step-00000008").exists()
        (end,) = run_command(*command)
        assert end.code == 0, end.output
        curves.append(curve(run))
    assert curves[0] == curves[1]
    assert [line["samples"] for line in read_metrics(run)] == [4, 8, 16, 24, 32, 40, 48, 56]
    assert "settings changed" in (run / "events.jsonl").read_text()


def test_start_that_finds_nothing_to_do_changes_no_file(ended: Path) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in (ended / "run").rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    (end,) = run_command("pretrain", ended / "config.toml")
    assert end.code == 0, end.output
    assert "nothing to do" in end.output
    assert state() == before
