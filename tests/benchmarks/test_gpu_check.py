"""The GPU check, with CPU processes in the GPUs' place; and without a GPU it says so."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.command import run_command
from tests.pretrain.command import write_config


def test_without_a_gpu_it_says_that_nothing_was_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 0
    assert "NOTHING WAS CHECKED" in capsys.readouterr().out


def test_layouts_grow_with_the_host() -> None:
    assert {n for n, _, _ in gpu_check.layouts(1)} == {1}
    assert {n for n, _, _ in gpu_check.layouts(6)} == {1, 2, 4}
    options = [" ".join(words) for _, _, words in gpu_check.layouts(8)]
    for wanted in ("zero_stage 3", "tensor 2", "pipeline 2", "context 2"):
        assert any(wanted in words for words in options)


def forked(
    words: list[str], *, check: bool, stdout: int | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a transxssm command, by ranks that need not import everything first."""
    processes = int(words[words.index("--nproc-per-node") + 1]) if "torch" in words[2] else 1
    ends = run_command(*words[words.index("pretrain") + 1 :], ranks=processes)
    assert [end.code for end in ends] == [0] * processes, ends[0].output
    return subprocess.CompletedProcess(words, 0, ends[0].output.splitlines()[-1])


def test_the_whole_way(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = write_config(tmp_path, tiny_data)
    monkeypatch.setattr(gpu_check, "CONFIG", config)
    monkeypatch.setattr(gpu_check.subprocess, "run", forked)
    kept = [(2, "fp32", ["--parallel.tensor", "2"])]
    monkeypatch.setattr(gpu_check, "layouts", lambda gpus: kept)
    assert gpu_check.check(2, 4, tmp_path)
    assert "3 of 3 runs met" in capsys.readouterr().out


def test_a_curve_that_leaves_the_cpus_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(folder: Path, processes: int, *rest: Any, gpu: bool = True) -> list[float]:
        folder.mkdir()
        losses = [3.0, 2.0 + 0.01 * processes]
        text = "".join(json.dumps({"loss": loss}) + "\n" for loss in losses)
        (folder / "metrics.jsonl").write_text(text)
        return losses[1:] if folder.name == "resumed" else losses

    monkeypatch.setattr(gpu_check, "train", train)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *words, **options: None)
    monkeypatch.setattr(gpu_check, "bits_per_byte", lambda model, gpu: 2.0 + 0.001 * gpu)
    monkeypatch.setattr(gpu_check, "layouts", lambda gpus: [(1, "fp32", []), (2, "fp32", [])])
    assert not gpu_check.check(2, 2, tmp_path)
    assert "2 of 4 runs met" in capsys.readouterr().out
