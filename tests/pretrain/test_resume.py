"""What a run starts from: changes are shown, dangerous ones refused; new runs may begin with the
weights of a checkpoint or of an exported model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkpoint_layouts import stored_tensors
from benchmarks.ranks import run_ranks
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.manifest import read_manifest
from pretrain.same_run import differences
from tests.pretrain.command import paragraph, read_metrics, run_command, succeed, write_config

STEP_2 = "run/checkpoints/step-00000002"


@pytest.fixture(scope="module")
def ended(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("ended")
    succeed("pretrain", write_config(folder, tiny_data, training={"steps": 2}))
    return folder


def test_differences_have_dotted_names() -> None:
    there = {"a": {"x": 1, "y": {"k": 1}, "gone": 0}, "b": {"z": 2}}
    here = {"a": {"x": 2, "y": {"k": 2}, "new": 0}, "b": {"z": 2}}
    assert differences(there, here) == {
        "a.x": (1, 2),
        "a.y.k": (1, 2),
        "a.gone": (0, None),
        "a.new": (None, 0),
    }


def test_harmless_changes_are_told_and_go_on(ended: Path, tmp_path: Path, tiny_data: Path) -> None:
    options = [f"--checkpoint.resume={ended / STEP_2}", f"--logging.run_dir={tmp_path / 'run'}"]
    options += ["--training.steps=3", "--optimizer.lr=0.002", "--parallel.tensor=2"]
    for end in run_command("pretrain", ended / "config.toml", *options, ranks=2):
        assert end.code == 0, end.output
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert "changed since step-00000002: training.steps: 2 there, 3 here" in log
    assert "changed since step-00000002: optimizer.lr: 0.001 there, 0.002 here" in log
    assert "changed since step-00000002: parallel.tensor: 1 there, 2 here" in log
    assert "logging.run_dir:" not in log
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [3]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ("--model.rope_theta=500.0", "allow_model_change"),
        ("--model.rms_norm_eps=1e-5", "allow_model_change"),
        ("--data.seed=7", "allow_data_change"),
        ("--data.shuffle_window=8192", "allow_data_change"),
    ],
)
def test_dangerous_changes_need_their_flag(
    change: str, flag: str, ended: Path, tmp_path: Path
) -> None:
    options = [f"--checkpoint.resume={ended / STEP_2}", f"--logging.run_dir={tmp_path / 'run'}"]
    options += ["--training.steps=3", change]
    (end,) = run_command("pretrain", ended / "config.toml", *options)
    assert end.code == 1
    field = change.removeprefix("--").split("=")[0]
    assert f"{field}: " in paragraph(end.output)
    assert f"--checkpoint.{flag} true" in paragraph(end.output)
    (told,) = run_command("pretrain", ended / "config.toml", *options, f"--checkpoint.{flag}=true")
    assert told.code == 0, told.output
    assert "WARNING" in (tmp_path / "run/logs/rank-0.log").read_text()


def faults(step_dirs: list[Path]) -> list[str | None]:
    """What two ranks find together."""
    from parallel.compat import prepare_host
    from parallel.groups import init_distributed
    from parallel.launch import launch_from_environment
    from pretrain.resume import _fault

    init_distributed(launch_from_environment(), prepare_host())
    return [_fault(step_dir) for step_dir in step_dirs]


def test_ranks_share_the_files_out_and_leave_out_none(ended: Path, tmp_path: Path) -> None:
    sound = ended / STEP_2
    names = sorted(read_manifest(sound)["files"])
    copies = []
    for name in names:
        copy = Path(shutil.copytree(sound, tmp_path / name / sound.name))
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
        copies.append(copy)
    for found in run_ranks(2, faults, [*copies, sound]):
        assert found.pop() is None
        for name, fault in zip(names, found, strict=True):
            assert fault is not None
            assert f"/{name} has checksum" in fault


def test_no_flag_fits_a_tensor_of_another_shape(ended: Path, tmp_path: Path) -> None:
    options = [f"--checkpoint.resume={ended / STEP_2}", f"--logging.run_dir={tmp_path / 'run'}"]
    options += ["--model.intermediate_size=128", "--checkpoint.allow_model_change=true"]
    (end,) = run_command("pretrain", ended / "config.toml", *options, "--training.steps=3")
    assert end.code == 1
    assert "but the [model] section gives it torch.float32 [128, 32]" in paragraph(end.output)
    assert "feed_forward" in paragraph(end.output)


@pytest.mark.parametrize("exported", [False, True], ids=["checkpoint", "exported"])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), (4, {"tensor": 2, "pipeline": 2}), (2, {"zero_stage": 3})],
    ids=["one", "tensor2-pipeline2", "zero3"],
)
def test_a_new_run_begins_with_weights_alone(
    ranks: int,
    parallel: dict[str, Any],
    exported: bool,
    ended: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    source = ended / "run"
    if exported:
        source = tmp_path / "model"
        export_checkpoint(ended / "run", source)
    config = write_config(
        tmp_path, tiny_data, parallel=parallel, training={"steps": 1, "seed": 99},
        optimizer={"lr": 1e-30}, checkpoint={"load_weights_only": str(source)},
    )  # fmt: skip
    for end in run_command("pretrain", config, ranks=ranks):
        assert end.code == 0, end.output
    (metrics,) = read_metrics(tmp_path / "run")
    assert metrics["samples"] == 4  # its own count
    before = stored_tensors(ended / STEP_2)
    after = stored_tensors(tmp_path / "run/checkpoints/step-00000001")
    for name, tensor in after.items():
        if name.startswith("weight."):  # so small a step changes none
            assert torch.equal(tensor, before[name]), name


def test_weights_of_another_model_are_refused(ended: Path, tiny_data: Path, tmp_path: Path) -> None:
    export_checkpoint(ended / "run", tmp_path / "model")

    def refused(source: Path, *options: str, **model: Any) -> str:
        only = {"load_weights_only": str(source)}
        config = write_config(tmp_path, tiny_data, model=model, checkpoint=only)
        (end,) = run_command("pretrain", config, *options)
        assert end.code == 1, end.output
        return paragraph(end.output)

    allow = "--checkpoint.allow_model_change=true"
    for source in (tmp_path / "model", ended / "run"):
        said = refused(source, intermediate_size=128)
        assert "model.intermediate_size: 64 there, 128 here" in said
        assert "feed_forward" in refused(source, allow, intermediate_size=128)
        # what fits, but means something else
        assert "model.rope_theta: 10000.0 there, 500.0 here" in refused(source, rope_theta=500.0)
    assert "nowhere" in refused(tmp_path / "nowhere")


def test_a_checkpoint_and_weights_alone_contradict(ended: Path) -> None:
    options = [f"--checkpoint.resume={ended / STEP_2}", f"--checkpoint.load_weights_only={ended}"]
    (end,) = run_command("pretrain", ended / "config.toml", *options)
    assert end.code == 2
    assert "use one of them" in paragraph(end.output)


def test_a_run_goes_on_without_the_checkpoint_it_came_from(ended: Path, tmp_path: Path) -> None:
    shutil.copytree(ended / STEP_2, tmp_path / "step-00000002")
    options = [f"--checkpoint.resume={tmp_path / 'step-00000002'}"]
    options += [f"--logging.run_dir={tmp_path / 'run'}"]
    succeed("pretrain", ended / "config.toml", *options, "--training.steps=4")
    shutil.rmtree(tmp_path / "step-00000002")
    succeed("pretrain", ended / "config.toml", *options, "--training.steps=5")
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [3, 4, 5]


def test_stages_that_have_begun_may_change_from_the_next_sample_on(
    tiny_data: Path, tmp_path: Path
) -> None:
    def start(batch: int, steps: int) -> Any:
        source = {"path": str(tiny_data / "train"), "name": "web"}
        stage = {"from_tokens": 512, "weights": {"web": 1.0}, "global_batch_size": batch}
        data = {"train": "", "sources": [source], "stages": [stage]}
        steps_ = {"steps": steps, "eval_every": 0}
        return run_command(
            "pretrain", write_config(tmp_path, tiny_data, data=data, training=steps_)
        )

    assert start(8, 4)[0].code == 0
    (end,) = start(16, 6)
    assert end.code == 0, end.output
    assert "from step 5 (sample 24) on: global_batch_size: 8 → 16" in end.output
    samples = [line["samples"] for line in read_metrics(tmp_path / "run")]
    assert samples == [4, 8, 16, 24, 40, 56]


def test_a_checkpoint_folder_that_cannot_be_written_is_found_at_the_start(
    tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    saves = {"dir": str(tmp_path / "file/checkpoints"), "every": 0}
    (end,) = run_command("pretrain", write_config(tmp_path, tiny_data, checkpoint=saves))
    assert end.code == 1
    assert f"checkpoint.dir {tmp_path}/file/checkpoints cannot be written" in paragraph(end.output)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    (tmp_path / "there/latest").mkdir(parents=True)
    saves = {"dir": str(tmp_path / "there"), "every": 0}
    (end,) = run_command("pretrain", write_config(tmp_path, tiny_data, checkpoint=saves))
    assert end.code == 1
    assert f"{tmp_path}/there/latest is a folder; remove it" in paragraph(end.output)
