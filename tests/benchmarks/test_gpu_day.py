"""The GPU day on a CPU: every measurement runs, a cut-off loses one, pages name the card."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import gpu_day
from benchmarks import gpu_day_measurements as measurements
from benchmarks.gpu_day import PLAN, Outcome, main, run_plan
from benchmarks.gpu_day_page import BEGIN, END, page, put_into, table
from benchmarks.ranks import run_ranks


def tiny(name: str) -> list[measurements.Row]:
    rows: list[measurements.Row] = getattr(measurements, name)(True)
    return rows


@pytest.mark.parametrize("name", [name for name, _ in PLAN if name != "self_check"])
def test_every_measurement_runs_on_a_cpu(name: str) -> None:
    (rows,) = run_ranks(1, tiny, name)
    assert rows
    for row in rows:
        numbers = [v for v in row.values() if isinstance(v, float)]
        assert all(value >= 0 for value in numbers), row
    assert table(rows).count("\n") == len(rows) + 1
    json.dumps(rows)


def test_busy_time_counts_overlapping_kernels_once() -> None:
    assert measurements.busy_microseconds([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7


def outcome(name: str, **changes: object) -> Outcome:
    fields = {
        "name": name, "device": "NVIDIA X", "software": "torch 0", "stand_in": False,
        "seconds": 1.0, "rows": [{"what": "a", "ms": 1234.5}], "error": "",
    }  # fmt: skip
    return Outcome(**(fields | changes))  # type: ignore[arg-type]


def test_a_page_names_the_card_and_what_failed() -> None:
    text = page([asdict(outcome("head")), asdict(outcome("scans", error="Traceback\nOops: no"))])
    assert "On one NVIDIA X: torch 0." in text
    assert "| a | 1,234 |" in text or "| a | 1,235 |" in text
    assert "Failed: `Oops: no`" in text
    assert "Stand-in" not in text


def test_stand_in_numbers_are_marked_and_get_into_no_document(tmp_path: Path) -> None:
    stand_in = asdict(outcome("head", stand_in=True))
    assert "Stand-in numbers" in page([stand_in])
    document = tmp_path / "gpu.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    with pytest.raises(ValueError, match="dry run"):
        put_into(document, [stand_in])
    assert "old" in document.read_text()
    put_into(document, [asdict(outcome("head"))])
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    with pytest.raises(SystemExit) as end:
        main(["--dry-run", "--page", str(document)])
    assert end.value.code == 2


def test_a_cut_off_loses_one_measurement_and_a_resume_makes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = (("self_check", 60), ("launch_floor", 0), ("head", 60))
    monkeypatch.setattr(gpu_day, "PLAN", plan)
    done = outcome("self_check", stand_in=True)
    (tmp_path / "self_check.json").write_text(json.dumps(asdict(done)))

    class Instant:
        def __init__(self, name: str, dry_run: bool, folder: Path) -> None:
            self.name, self.path = name, folder / f"{name}.json"

        def run(self, limit: float) -> str:
            if limit <= 0:
                return "cut off"
            self.path.write_text(json.dumps(asdict(outcome(self.name))))
            return "done"

    monkeypatch.setattr(gpu_day, "Worker", Instant)
    outcomes = run_plan(tmp_path, 1.0, dry_run=True)
    assert [o.name for o in outcomes] == ["self_check", "head"]
    said = capsys.readouterr().out
    assert "self_check: done before" in said
    assert "cut off" in said
    monkeypatch.setattr(gpu_day, "PLAN", (*plan[:1], ("launch_floor", 60), plan[2]))
    assert [o.name for o in run_plan(tmp_path, 1.0, dry_run=True)] == [
        "self_check", "launch_floor", "head",
    ]  # fmt: skip


def test_what_there_is_no_time_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Never:
        path = tmp_path / "none.json"

        def __init__(self, *_: object) -> None: ...

        def run(self, limit: float) -> str:
            time.sleep(0.01)
            return "cut off"

    monkeypatch.setattr(gpu_day, "Worker", Never)
    assert run_plan(tmp_path, 0.0001, dry_run=True) == []
    said = capsys.readouterr().out
    assert all(f"{name}: left out, the time is up" in said for name, _ in PLAN[1:])
