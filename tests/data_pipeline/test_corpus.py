import json
import os
from pathlib import Path

import pytest

from data_pipeline import reading
from data_pipeline.corpus import BLOCK_BYTES, SAMPLED_BLOCKS, units
from data_pipeline.demo import demo_corpus
from data_pipeline.errors import DataError
from data_pipeline.reading import documents


def texts(*inputs: Path | str, **kwargs: str) -> list[str]:
    return [document.text for document in documents(list(inputs), **kwargs)]


def test_folder_is_read_recursively_sorted_and_without_hidden_or_binary_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.py", ".git/x.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a/y.py", "a/z.md", "b.txt"]
    assert texts(str(tmp_path / "**" / "*.md")) == ["a/z.md"]
    assert texts(tmp_path / "image.png") == ["image.png"]


def test_linked_folders_are_read_once_and_suffixes_in_any_case(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "B.TXT").write_text("b")
    (tmp_path / "elsewhere" / "C.Jsonl").write_text('{"text": "c"}')
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "loop").symlink_to("loop")
    (tmp_path / "in" / "one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "two").symlink_to(tmp_path / "elsewhere")
    assert texts(tmp_path / "in") == ["b", "c"]


def test_a_pattern_may_match_folders(tmp_path):
    for name in ("one/a.txt", "one/image.png", "two/b.txt", "two/x.xz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*") == ["one/a.txt", "two/b.txt"]
    assert texts(tmp_path / "on*") == ["one/a.txt"]
    assert texts(tmp_path / "one" / "**") == ["one/a.txt", "one/image.png"]
    with pytest.raises(DataError, match=r"x\.xz: \.xz files cannot be read; unpack"):
        texts(tmp_path / "two" / "*")


def test_a_name_may_be_no_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("text")
    assert texts(tmp_path) == ["text"]


def test_document_ids_do_not_depend_on_the_place_and_are_unique(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root / "sub").mkdir(parents=True)
        (tmp_path / root / "sub" / "a.txt").write_text("text")
        (tmp_path / root / "b.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    one = [d.id for d in documents([tmp_path / "one"])]
    assert one == [d.id for d in documents([tmp_path / "two"])]
    both = [d.id for d in documents([tmp_path / "one", tmp_path / "two"])]
    assert len(set(both)) == len(both) == 6
    globbed = [
        [d.id for d in documents([str(tmp_path / r / "**" / "*.*")])] for r in ("one", "two")
    ]
    assert globbed[0] == globbed[1]


def test_jsonl_reads_the_named_field_and_skips_blank_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one"}\n\n{"body": "two\\n\\u00e9"}\n{"body": " "}')
    assert texts(file, text_field="body") == ["one", "two\né"]


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path) == ["hello"]


@pytest.mark.parametrize("text", ["zeile ä\n" * 40, "é" * 200, "🙂x" * 77, "abc\n" * 64])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_long_document_comes_in_parts_without_losing_a_character(tmp_path, monkeypatch, text, name):
    monkeypatch.setattr(reading, "PART_BYTES", 64)
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}))
    parts = list(documents([tmp_path]))
    assert "".join(d.text for d in parts) == text
    assert len(parts) > 3
    assert len({d.id for d in parts}) == 1
    assert [d.ends for d in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(d.num_bytes for d in parts) == len(text.encode())


@pytest.mark.parametrize("end", ["", " " * 100])
def test_blank_parts_begin_no_document_but_go_on_with_one(tmp_path, monkeypatch, end):
    monkeypatch.setattr(reading, "PART_BYTES", 64)
    (tmp_path / "a.txt").write_text(" " * 200 + "x" + end)
    (tmp_path / "b.txt").write_text(" " * 200)
    parts = list(documents([tmp_path]))
    assert "".join(d.text for d in parts).strip() == "x"
    assert [d.ends for d in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"a\.jsonl:2: not valid JSON"),
        ('["x"]', r"a\.jsonl:2: a JSON list"),
        ('{"text": 3}', r"a\.jsonl:2: field 'text' is int"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: .*surrogate"),
        ('{"text": "x", "n": ' + "7" * 5000 + "}", r"a\.jsonl:2: not valid JSON.*digits"),
    ],
    ids=["syntax", "list", "number", "surrogate", "digits"],
)
def test_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        texts(tmp_path)


def test_file_that_is_not_utf8_is_named_with_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PART_BYTES", 64)
    (tmp_path / "a.txt").write_bytes(b"fine line\n" * 20 + b"caf\xe9 au lait\n")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 203 \(0xe9\).*iconv"):
        texts(tmp_path)


def test_too_long_jsonl_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 64)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 100}))
    with pytest.raises(DataError, match="longer than 64 bytes"):
        texts(tmp_path)


def test_missing_and_empty_corpora_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file"):
        texts(tmp_path / "nowhere")
    with pytest.raises(DataError, match="corpus is empty"):
        texts(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="corpus is empty"):
        texts(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(DataError, match="unpack"):
        texts(tmp_path / "a.zip")


def test_demo_corpus_is_large_readable_and_refuses_to_overwrite(tmp_path):
    made = demo_corpus(tmp_path / "demo")
    assert made.num_bytes > 4_000_000
    assert sum(1 for _ in documents([made.folder])) == made.files
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(DataError, match="exists"):
        demo_corpus(tmp_path / "demo")


def test_large_files_are_told_apart_by_blocks_from_head_to_tail(tmp_path: Path) -> None:
    size = 3 * SAMPLED_BLOCKS * BLOCK_BYTES
    path, seen = tmp_path / "a.txt", set()
    last = SAMPLED_BLOCKS - 1
    at = [(size - BLOCK_BYTES) * number // last for number in range(SAMPLED_BLOCKS)]
    for changed in (None, *at, size - 1, *(begin + BLOCK_BYTES - 1 for begin in at[:-1])):
        content = bytearray(b"a" * size)
        if changed is not None:
            content[changed] = ord("b")
        path.write_bytes(content)
        ((piece,),) = units([path], 1 << 30)
        seen.add(piece.content)
    path.write_bytes(b"a" * (size + 1))
    ((piece,),) = units([path], 1 << 30)
    assert len(seen | {piece.content}) == 1 + SAMPLED_BLOCKS + 1 + SAMPLED_BLOCKS - 1 + 1


def test_demo_corpus_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "demo.tmp").symlink_to("victim")
    with pytest.raises(DataError, match=r"demo\.tmp: cannot be made \(File exists\); remove it"):
        demo_corpus(tmp_path / "demo")
    assert not list((tmp_path / "victim").iterdir())
