"""`transxssm doctor --kernels`, and the checks that training begins with."""

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from parallel import self_check
from parallel.config import ModelConfig
from pretrain import kernel_check
from pretrain.cli import app
from tests.parallel.failing_path import fail_first_path
from tests.pretrain.command import paragraph, run_command, write_config

CPU = torch.device("cpu")


def test_without_a_gpu_kernels_are_interpreted_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ran: list[dict[str, str]] = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        ran.append(env)
        assert command[1:] == ["-m", "pretrain.kernel_check"]
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    end = CliRunner().invoke(app, ["doctor", "--kernels"])
    assert end.exit_code == 1  # as that process ends
    assert ran[0]["TRITON_INTERPRET"] == "1"
    assert ran[0]["TRANSXSSM_KERNELS"] == "triton"
    assert "no GPU here: kernels are interpreted, not compiled" in end.output
    assert "float32 sums inside products are not checked" in end.output


def test_kernels_and_layout_exclude_each_other() -> None:
    end = CliRunner().invoke(app, ["doctor", "--kernels", "--layout", "my.toml"])
    assert end.exit_code == 2
    assert "exclude each other" in end.output


def test_outcomes_are_told_and_a_failure_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = self_check.CHECKS[:2]
    outcomes = [(first, None), (second, "results differ by 1.0e+00 of their size")]
    monkeypatch.setattr(self_check, "run_checks", lambda *_: iter(outcomes))
    assert kernel_check.check(ModelConfig(), CPU) == 1
    out = capsys.readouterr().out
    assert f"OK   {first.path:<29}agrees\n" in out
    assert f"FAIL {second.path:<29}results differ by 1.0e+00 of their size\n" in out
    assert f"→ training does without: {second.instead} instead" in out
    assert "1 of 2 paths fail" in out


def test_a_check_that_nothing_can_replace_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def checks(*_: object) -> Iterator[None]:
        raise self_check.SelfCheckError("ssd left cuda:0 unusable")
        yield

    monkeypatch.setattr(self_check, "run_checks", checks)
    assert kernel_check.check(ModelConfig(), CPU) == 1
    assert "FAIL ssd left cuda:0 unusable" in capsys.readouterr().out


def test_kernels_that_do_not_run_are_not_said_to_agree(capsys: pytest.CaptureFixture[str]) -> None:
    kernel_check.check(ModelConfig(), CPU)
    assert capsys.readouterr().out == (
        "nothing to check: TRANSXSSM_KERNELS keeps the kernels from running\n"
    )


# -- training --------------------------------------------------------------------------------------


def test_training_goes_on_without_a_path_that_fails(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, training={"steps": 1, "dtype": "bf16"})
    (end,) = run_command("pretrain", config, before=fail_first_path)
    assert end.code == 0, end.output
    path = self_check.CHECKS[0].path
    assert end.output.count(f"{path} failed its check on the device: rank 0: RuntimeError:") == 1


def test_training_stops_where_nothing_can_run_instead(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, training={"steps": 1})
    before = partial(fail_first_path, nothing_instead=True)
    (end,) = run_command("pretrain", config, before=before)
    assert end.code == 1
    path = self_check.CHECKS[0].path
    assert paragraph(end.output).startswith(
        f"error: {path}: what would run in its place fails as well: RuntimeError: no such kernel"
    )
