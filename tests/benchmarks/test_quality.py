"""The quality benchmark: a campaign of a minute, gone on with, and its arithmetic."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality import ALL, CHOSEN, Run, interval, main


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(interval([1.0])[1])


def test_every_run_has_a_folder_of_its_own() -> None:
    names = [Run(rival, seed).name for rival in ALL for seed in (1, 2)]
    assert len(set(names)) == len(names)
    assert set(CHOSEN) < set(ALL)


def test_campaign_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        quality, "MODEL", quality.MODEL.model_copy(update={"hidden_size": 32, "num_layers": 8})
    )
    words = ["--quick", "--folder", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "against TransXSSM" in said.out
    assert (tmp_path / "quality.png").read_bytes()[1:4] == b"PNG"
    remembered = tmp_path / "results-8.json"
    found = json.loads(remembered.read_text())
    assert len(found) == 4
    assert all(7 < result["loss"] < 9 for result in found.values())  # log(4096) = 8.3
    dropped = Run(CHOSEN[1], 2).name
    remembered.write_text(json.dumps({n: r for n, r in found.items() if n != dropped}))
    assert main(words) == 0
    assert capsys.readouterr().err.count(", loss ") == 1
    again = json.loads(remembered.read_text())
    assert again[dropped]["loss"] == found[dropped]["loss"]


def test_a_run_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: Run, folder: Path, steps: int) -> None:
        raise RuntimeError(f"{run.name} ended with 1")

    monkeypatch.setattr(quality, "train", fail)
    monkeypatch.setattr(quality, "prepare_data", lambda folder: None)
    assert main(["--quick", "--folder", str(tmp_path)]) == 1
    assert "transxssm-1 ended with 1" in capsys.readouterr().err
