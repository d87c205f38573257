"""Rows of JSON: the names their files have, where their text is, and what has none."""

import gzip
import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.reading import documents
from data_pipeline.tokenizer import train_tokenizer
from tests.conftest import missing

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(*inputs: Path | str, **options: Any) -> list[str]:
    return [document.text for document in documents(list(inputs), **options)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("suffix", [".json", ".ndjson", ".jsonlines", ".jsonl", ".JSON"])
def test_json_lines_are_rows_under_every_name(suffix: str, packed: str, tmp_path: Path) -> None:
    content = lines(*({"text": f"t{n}", "id": n} for n in range(5))).encode()
    file = tmp_path / f"c4-train.00000-of-01024{suffix}{packed}"
    file.write_bytes(PACKED[packed](content))
    (tmp_path / "README.md").write_text("about")
    expected = [f"t{n}" for n in range(5)]
    assert texts(file) == expected
    assert sorted(texts(tmp_path)) == sorted([*expected, "about"])


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}]', '\ufeff[\n{"text": "a"}\n]', "[" * 1000, ' \n\n[{"text": "a"}]']
)
def test_a_json_array_is_refused_with_a_way_out(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.reading.MAX_LINE_BYTES", 256)
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(
        DataError, match=r"rows\.json: is a JSON array.*jq -c '\.\[\]' /.*/rows\.json > /"
    ):
        texts(tmp_path)


def test_the_way_out_of_a_packed_array_unpacks_it(tmp_path: Path) -> None:
    (tmp_path / "my rows.json.gz").write_bytes(gzip.compress(b"[1]"))
    with pytest.raises(
        DataError,
        match=r"gzip -dc '/.*/my rows\.json\.gz' \| jq -c '\.\[\]' > '/.*/my rows\.jsonl'",
    ):
        texts(tmp_path)


def test_the_way_out_overwrites_no_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "c4.00001.jsonl").write_text('{"text": "a"')
    with pytest.raises(DataError, match=r"> /.*/c4\.00001\.rows\.jsonl`"):
        texts(tmp_path)


def test_json_over_several_lines_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "a"}, indent=1))
    with pytest.raises(
        DataError, match=r"a\.json:1: not valid JSON.*`jq -c '\.' /.*/a\.json > /.*/a\.jsonl`"
    ):
        texts(tmp_path)


def test_what_the_walk_of_a_folder_skips_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("a.png", "b.png", "c.png", "d.png", "LICENSE", "x.jsonl.xz", "dataset_info.json")
    for name in (*names, ".hidden", "a.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert texts(tmp_path) == ["text"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert said.startswith(f"{tmp_path}: 8 files are skipped")
    assert "4 .png (a.png, b.png, c.png, ...)" in said
    for name in ("LICENSE", "x.jsonl.xz", "dataset_info.json", "gone.txt"):
        assert name in said
    assert ".hidden" not in said


def test_rows_under_a_name_that_says_nothing_are_not_taken_for_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("part-00000", "data.gz", "rows.dat"):
        content = lines({"text": "a"}, {"text": "b"}).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name == "data.gz" else content)
        with pytest.raises(DataError, match=f"{name}: holds rows of JSON.*rename it"):
            texts(tmp_path / name)
    (tmp_path / "rows.txt").write_bytes(content)
    assert len(texts(tmp_path / "rows.txt")) == 1
    assert "rows.txt: holds rows of JSON" in caplog.text


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.arrow"])
def test_tables_that_cannot_be_read_are_refused_not_read_as_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text\nhello\n")
    with pytest.raises(DataError, match=r"files cannot be read; unpack or convert it"):
        texts(tmp_path / name)


# -- fields --------------------------------------------------------------------------------------


def test_a_nested_field_is_named_by_its_path(tmp_path: Path) -> None:
    rows = [
        {"content": {"text": "nested", "n": 1}},
        {"content.text": "its own name comes first", "content": {"text": "no"}},
        {"content": {"deep.er": {"text": "unused"}, "text": "second"}},
    ]
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    found = texts(tmp_path, text_field="content.text")
    assert found == ["nested", "its own name comes first", "second"]
    (tmp_path / "a.jsonl").write_text(lines({"a": {"b.c": {"d": "x"}}}))
    assert texts(tmp_path, text_field="a.b.c.d") == ["x"]


def test_a_field_that_holds_fields_says_which(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"content": {"text": "a", "lang": "en"}}))
    with pytest.raises(DataError, match=r"is dict, not a string.*content\.text, content\.lang"):
        texts(tmp_path, text_field="content")
    with pytest.raises(
        DataError, match=r"no field 'text' \(fields: content\.text, content\.lang\)"
    ):
        texts(tmp_path)


def by_the_way_out(error: DataError) -> str:
    """Run the command that an error gives, in backquotes, and return the file it writes."""
    if shutil.which("jq") is None:
        missing("jq is not installed")
    command = str(error).split("`")[1]
    subprocess.run(command, shell=True, check=True)
    return command.rpartition("> ")[2]


@pytest.mark.parametrize("name", ["data", 'it\'s "rows"'])
def test_an_object_around_the_rows_is_refused_with_a_way_out(name: str, tmp_path: Path) -> None:
    """As SQuAD comes."""
    (tmp_path / "train.json").write_text(
        lines({"version": "2", name: [{"text": "a"}, {"text": "b"}]})
    )
    with pytest.raises(DataError, match=r"in its only row\. .* is a list of 2 objects") as caught:
        texts(tmp_path)
    written = by_the_way_out(caught.value)
    assert texts(written) == ["a", "b"]


@pytest.mark.parametrize(
    "value",
    [[{"role": "user", "content": "hello"}, {"role": "x", "content": "you"}], ["hello", "you"]],
)
def test_a_list_in_the_place_of_the_text_has_a_way_out(value: list[Any], tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(lines({"a": {"messages": value}}))
    with pytest.raises(DataError, match=r"'a\.messages' is list, not a string") as caught:
        texts(tmp_path, text_field="a.messages")
    written = by_the_way_out(caught.value)
    assert texts(written) == ["hello\nyou"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text".encode("utf-16"), "it is UTF-16: `iconv -f UTF-16 -t UTF-8 a.jsonl > fixed.jsonl`"),
        (gzip.compress(b"text"), "it is compressed by gzip: rename it to a.jsonl.gz"),
        (zstandard.compress(b"text"), "it is compressed by Zstandard: rename it to a.jsonl.zst"),
    ],
    ids=["utf-16", "gzip", "zstd"],  # gzip writes the time into its bytes
)
def test_another_kind_of_file_is_recognised(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts(tmp_path)
    assert said in str(caught.value)


def test_each_input_may_have_a_field_of_its_own(tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.jsonl").write_text(lines({"body": "one"}, {"body": "two"}))
    (tmp_path / "b.json").write_text(lines({"content": {"text": "three"}, "body": "no"}))
    inputs, fields = [tmp_path / "a", tmp_path / "b.json"], ["body", "content.text"]
    assert texts(*inputs, text_field=fields) == ["one", "two", "three"]
    metas = prepare(
        inputs, tokenizer_file, tmp_path / "o", 32, text_field=fields, validation_fraction=0
    )
    assert metas["train"].documents == 3
    assert train_tokenizer(inputs, tmp_path / "tok", 258, fields).exists()
    with pytest.raises(DataError, match=r"2 text fields \(x, y\) for 3 inputs"):
        texts(*inputs, tmp_path / "b.json", text_field=["x", "y"])


def test_an_input_without_the_field_is_an_error_that_names_its_fields(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": "fine"}))
    (tmp_path / "b.jsonl").write_text(lines(*[{"body": "x"}] * 5))
    message = r"b\.jsonl: no field 'text' \(fields: body\).*first 5 rows.*--text-field"
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tokenizer_file, tmp_path / "o", 32)
    assert not list(tmp_path.glob("o*"))
    assert texts(tmp_path) == ["fine"]  # one input: rows of b have no text


# -- rows without text ---------------------------------------------------------------------------


def write_rows(folder: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, {"n": 1}, {"text": " "}, {"text": "b"}]
    (folder / "a.jsonl").write_text(lines(*rows))
    nested = [{"text": {"x": "c"}}, {"text": None}, {"text": {}}, {"text": {"x": None}}]
    (folder / "b.jsonl").write_text(lines(*nested))


def test_rows_without_text_are_counted_and_do_not_end_a_run(
    tokenizer_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path)
    inputs, fields = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ["text", "text.x"]
    assert texts(*inputs, text_field=fields) == ["a", "b", "c"]
    assert "6 rows have no text" in caplog.text
    metas = prepare(
        inputs, tokenizer_file, tmp_path / "o", 32, text_field=fields, validation_fraction=0.0,
        unit_bytes=20, workers=1,
    )  # fmt: skip
    assert metas["train"].empty_rows == 6
    assert json.loads((tmp_path / "o" / "train" / "meta.json").read_text())["empty_rows"] == 6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, r"a\.jsonl:2: field 'text' is null.*--strict"),
        ({"title": "x"}, r"a\.jsonl:2: no field 'text' \(fields: title\).*--text-field.*--strict"),
    ],
)
def test_strictly_a_row_without_text_is_an_error(
    row: Any, message: str, tokenizer_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": "a"}, row))
    with pytest.raises(DataError, match=message):
        texts(tmp_path, strict=True)
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / "a.jsonl"], tokenizer_file, tmp_path / "o", 32, strict=True)


def test_strictly_a_null_of_parquet_is_an_error(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "b", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path) == ["a", "b"]
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' is null in row 2"):
        texts(tmp_path, strict=True)


def test_without_empty_rows_meta_has_the_bytes_it_always_had(prepared: Path) -> None:
    assert "empty_rows" not in (prepared / "train" / "meta.json").read_text()
