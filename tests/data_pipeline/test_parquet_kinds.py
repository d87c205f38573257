"""Columns of Parquet files that hold text, whatever Arrow calls their type."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.corpus import units
from data_pipeline.errors import DataError
from data_pipeline.reading import documents, unit_documents

VALUES = ["one", None, "zwei é", "one", ""]
BYTES = [None if value is None else value.encode() for value in VALUES]
KINDS: dict[str, Any] = {
    "string": pyarrow.array(VALUES, pyarrow.string()),
    "string_view": pyarrow.array(VALUES, pyarrow.string_view()),
    "large_string": pyarrow.array(VALUES, pyarrow.large_string()),
    "dictionary": pyarrow.array(VALUES).dictionary_encode(),
    "dictionary of large_string": pyarrow.array(VALUES, pyarrow.large_string()).dictionary_encode(),
    "binary": pyarrow.array(BYTES, pyarrow.binary()),
    "large_binary": pyarrow.array(BYTES, pyarrow.large_binary()),
    "binary_view": pyarrow.array(BYTES, pyarrow.binary_view()),
    "dictionary of binary": pyarrow.array(BYTES, pyarrow.binary()).dictionary_encode(),
}


def write(path: Path, **columns: Any) -> Path:
    table = pyarrow.table(columns)
    sliced = "view" not in str(table.schema)  # pyarrow cannot slice views within structs
    pyarrow.parquet.write_table(table, path, row_group_size=2 if sliced else None)
    return path


def texts(path: Path, column: str = "text") -> list[str]:
    return [document.text for document in documents([path], column)]


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_every_type_is_read(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", n=range(5), text=KINDS[kind])
    empty: Counter[str] = Counter()
    (unit,) = units([path], 1 << 30)
    assert [d.text for d in unit_documents(unit, "text", empty=empty)] == ["one", "zwei é", "one"]
    assert empty == {"null": 1, "blank": 1}


@pytest.mark.parametrize("kind", ["string", "string_view", "dictionary", "binary"])
def test_text_of_every_type_is_read_within_structs(kind: str, tmp_path: Path) -> None:
    inner = pyarrow.StructArray.from_arrays(
        [KINDS[kind], pyarrow.array(range(5))],
        ["te.xt", "n"],
        mask=pyarrow.array([False] * 3 + [True] * 2),
    )
    outer = pyarrow.StructArray.from_arrays([inner], ["content"])
    path = write(tmp_path / "a.parquet", n=range(5), row=outer)
    assert texts(path, "row.content.te.xt") == ["one", "zwei é"]
    with pytest.raises(DataError, match=r"row\.content'.*one of its fields.*row\.content\.te\.xt"):
        texts(path, "row.content")
    with pytest.raises(DataError, match=r"no column 'row\.content\.body'"):
        texts(path, "row.content.body")


def test_a_column_whose_name_has_dots_is_read(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.parquet", **{"a.b": ["x"], "a": [1]}), "a.b") == ["x"]
    both = write(tmp_path / "b.parquet", **{"a.b": ["x"], "a": [{"b": "y"}]})
    with pytest.raises(DataError, match=r"2 columns 'a\.b'; leave one of them"):
        texts(both, "a.b")


def test_a_column_of_nulls_alone_has_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=pyarrow.nulls(3))
    write(tmp_path / "b.parquet", text=["x"])
    assert texts(tmp_path) == ["x"]


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=pyarrow.array([b"fine", b"fine", b"\xff\xfe"]))
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' of row 2 is not UTF-8"):
        texts(tmp_path)


@pytest.mark.parametrize("values", [[1], [["a"]], [{"b": "x"}], [b"abc"]], ids=str)
def test_what_is_no_text_is_refused(values: Any, tmp_path: Path) -> None:
    kind = pyarrow.binary(3) if values == [b"abc"] else None
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' is .*, not a string"):
        texts(write(tmp_path / "a.parquet", text=pyarrow.array(values, kind)))
