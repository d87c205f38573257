"""Input files of `prepare` that are small and ask for much memory, or are no files at all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline import parquet, reading
from data_pipeline.errors import DataError
from data_pipeline.reading import documents

MANY: dict[str, Any] = {"compression": "zstd", "row_group_size": 1000}


def write(path: Path, texts: list[str | None], **options: Any) -> Path:
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(len(texts)), "text": texts}), path, **options
    )
    return path


def read(path: Path) -> dict[str, str]:
    """Text by document."""
    found: dict[str, str] = {}
    for document in documents([path]):
        found[document.id] = found.get(document.id, "") + document.text
    return found


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"write_statistics": False},
        {"write_page_checksum": True}, {"data_page_size": 100}, {"compression": "gzip"},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"row_group_size": 7}, {"dictionary_pagesize_limit": 200},
    ],
    ids=str,
)  # fmt: skip
def test_pages_of_every_kind_are_measured(
    options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str | None] = [f"a text, number {n} é" * (n % 40) for n in range(500)]
    texts[3] = None
    path, largest = write(tmp_path / "a.parquet", texts, **options), []
    real = parquet._largest_page
    monkeypatch.setattr(
        parquet, "_largest_page", lambda *a: largest.append(real(*a)) or largest[-1]
    )
    monkeypatch.setattr(parquet, "BATCH_BYTES", 4096)
    monkeypatch.setattr(parquet, "HEADER_BYTES", 8)
    assert read(path) == {f"0/a.parquet@{n}": text for n, text in enumerate(texts) if text}
    if "row_group_size" not in options:
        assert len(largest) == 1
        assert largest[0] >= len(max(filter(None, texts), key=len).encode())


def allocated(path: Path) -> int:
    """Bytes that pyarrow holds at most, whenever there is a document."""
    before = pyarrow.total_allocated_bytes()
    return max(pyarrow.total_allocated_bytes() - before for _ in documents([path]))


def test_few_bytes_of_many_large_values_take_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["x" * (1 << 22)] * 64, compression="zstd")
    assert path.stat().st_size < 4000
    assert allocated(path) < 1 << 27


def test_a_page_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path / "a.parquet", ["x " * (1 << 20)] * 8, compression="zstd", use_dictionary=False
    )
    assert len(read(path)) == 8
    monkeypatch.setattr(parquet, "MAX_PAGE_BYTES", 1 << 20)
    with pytest.raises(
        DataError, match=r"a\.parquet: a page of column 'text' has 16,777,\d+ bytes"
    ):
        read(path)


def test_headers_that_cannot_be_are_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["some text"] * 9)
    content = bytearray(path.read_bytes())
    start = pyarrow.parquet.read_metadata(path).row_group(0).column(1).dictionary_page_offset
    for spoilt in (
        b"\xff" * 20,
        b"\x15\x00\x15\x01\x15\x01\x00",
        b"\x1c" * 60,
        b"\x19\xfc\xff\xff\x7f" * 4,
    ):
        content[start : start + len(spoilt)] = spoilt
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: damaged"):
            read(path)


DAMAGE = """
import sys
from pathlib import Path
from data_pipeline.errors import DataError
from data_pipeline.reading import documents

path = Path(sys.argv[1])
whole = path.read_bytes()
begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
for at in range(begin, len(whole)):
    for change in (0x20, 0xFF):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        try:
            list(documents([path]))
        except DataError as error:
            assert str(path) in str(error) or "is empty" in str(error), error
"""


def test_damage_to_a_footer_is_a_sentence_and_never_the_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["some text"] * 9}), path, store_schema=False
    )
    done = subprocess.run([sys.executable, "-c", DAMAGE, path], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.decode()[-2000:]) == (0, "")


def test_a_column_that_is_not_where_the_schema_says_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["some text"] * 9, store_schema=False)
    content = path.read_bytes()
    schema, path_in_schema = (m.start() for m in re.finditer(b"\x04text", content))
    for at, text in ((schema, b"tezt"), (path_in_schema, b"tezt"), (schema, b"te\xffx")):
        path.write_bytes(content[: at + 1] + text + content[at + 5 :])
        with pytest.raises(DataError, match=r"a\.parquet: (damaged|no column|not a Parquet)"):
            read(path)


def test_the_footer_is_read_as_pyarrow_reads_it(tmp_path: Path) -> None:
    columns = {name: [f"{name}{n}" for n in range(50)] for name in ("a", "text", "b.c")}
    nested = pyarrow.array([{"text": "x", "on": [True, False]}] * 50)
    table = pyarrow.table(columns | {"nested": nested})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    metadata = pyarrow.parquet.read_metadata(tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as file:
        for leaf, column in enumerate(columns):
            found = list(parquet._chunks(file, column, [leaf]))
            assert len(found) == 3
            for group, (rows, (begin, end)) in enumerate(found):
                chunk = metadata.row_group(group).column(leaf)
                assert rows == metadata.row_group(group).num_rows
                assert begin == chunk.dictionary_page_offset
                assert end - begin == chunk.total_compressed_size


def test_a_large_value_of_a_row_comes_in_parts(tmp_path: Path) -> None:
    text = "été\n" * (3 << 20)
    path = write(tmp_path / "a.parquet", ["", text, "b"], compression="zstd")
    found = list(documents([path]))
    assert len(found) > 2
    assert "".join(document.text for document in found) == text + "b"


# -- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", ["[],", "{},", '"",', "1,", '{"a":1},', "[[[1]],[]],", '"\\"",'], ids=str
)
def test_a_line_of_very_many_values_is_refused(
    values: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_VALUES", 1000, raising=False)
    line = '{"text": "t", "rest": [' + values * 1000 + "1]}\n"
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n' + line)
    found = documents([tmp_path / "a.jsonl"])
    assert next(found).text == "first"
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line has more than 1,000 values"):
        next(found)


def test_a_long_text_of_many_marks_is_one_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_VALUES", 8)
    text = '[1, 2, {"a": 3}], \\" ' * 1000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "n": [1, 2]}) + "\n")
    assert [document.text for document in documents([tmp_path / "a.jsonl"])] == [text]
    for cut in ('{"text": "' + text, '{"text": "' + '\\"' * 5000):
        (tmp_path / "a.jsonl").write_text(cut)
        with pytest.raises(DataError, match=r"a\.jsonl:1: (not valid JSON|the line has more)"):
            list(documents([tmp_path / "a.jsonl"]))


# -- no files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz", "a.jsonl.zst"])
def test_devices_and_pipes_are_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a device"):
        list(documents([tmp_path / name]))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is a pipe"):
        list(documents([tmp_path / name]))
