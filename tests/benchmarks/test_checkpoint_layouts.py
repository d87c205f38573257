"""A part of the matrix of benchmarks.checkpoint_layouts."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import checkpoint_layouts
from benchmarks.checkpoint_layouts import QUICK, campaign


def test_layouts_read_each_others_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_layouts, "AFTER", 4)
    results = campaign(QUICK, tmp_path / "results.jsonl", Console())
    assert len(results) == len(QUICK)
    assert not [result for result in results if result["bad"]]
    assert max(result["error"] for result in results) > 0  # digits do differ between layouts
