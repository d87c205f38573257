"""What commands print into pipes: as wide as its content needs, and whole."""

import pytest
from rich.table import Column, Table

from pretrain.console import CELL_WIDTH, LONGEST_LIST, flat, print_fields, whole_console


def test_fields_are_lines_without_padding(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 5000
    print_fields({"a": 1, "long name": long, "lines": "one\ntwo", "empty": ""})
    assert capsys.readouterr().out.splitlines() == [
        "a          1", f"long name  {long}", "lines      one", "           two", "empty",
    ]  # fmt: skip


def test_inner_objects_are_fields_and_long_lists_are_counted() -> None:
    found = flat(
        {
            "layout": {"tensor": 2, "inner": {"x": 1}}, "short": [1, 2], "none": {},
            "long": list(range(LONGEST_LIST + 1)), "of": [{"step": 1}, {"step": 2}],
        }
    )  # fmt: skip
    assert found == {
        "layout.tensor": 2, "layout.inner.x": 1, "short": [1, 2], "none": {},
        "long": f"{LONGEST_LIST + 1} entries", "of.0.step": 1, "of.1.step": 2,
    }  # fmt: skip


def test_cells_fold_and_paths_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/folder" * 40
    table = Table("field", "a", Column("folder", no_wrap=True))
    table.add_row("name", "y" * 9000, path)
    table.add_row("other", "z", "short")
    whole_console().print(table)
    out = capsys.readouterr().out
    assert out.count("y") == 9000
    assert path in out
    assert max(map(len, out.splitlines())) < CELL_WIDTH + len(path) + 40
