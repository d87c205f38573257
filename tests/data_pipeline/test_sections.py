"""One text file as many documents."""

import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import reading
from data_pipeline import sections as module
from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.reading import documents
from data_pipeline.sections import Separator, sections
from data_pipeline.tokenizer import train_tokenizer
from tests.data_pipeline.test_prepare import split_texts

STORIES = [f"Story {n}.\n\nIt ends." for n in range(30)]


def texts(path: Path, separator: str) -> list[str]:
    return [document.text for document in documents([path], separator=separator)]


def test_a_string_separates_the_documents_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n")
    assert [t.rstrip("\n") for t in texts(tmp_path, "<|endoftext|>")] == STORIES
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("<|endoftext|>".join(STORIES).encode()))
    assert texts(tmp_path, "<|endoftext|>") == STORIES


@pytest.mark.parametrize("separator", ["\n\n", r"\n\n"])
def test_blank_lines_separate_documents(separator: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\none\nline\n\ntwo\r\n\r\nthree\n \t\n\n\n\nfour\n")
    assert texts(tmp_path, separator) == ["one\nline", "two", "three", "four\n"]
    assert texts(tmp_path, separator + separator) == ["\n\none\nline\n\ntwo\r\n\r\nthree", "four\n"]


def test_rows_are_not_separated(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\n\\nb"}\n')
    assert texts(tmp_path, "\n\n") == ["a\n\nb"]


@given(
    pieces=st.lists(st.sampled_from(["a", "b", "\n", " ", "\r\n", None]), max_size=40),
    separator=st.sampled_from(["a", "aa", "aba", "b\n", "\n", "\n\n", "\n\n\n"]),
)
def test_sections_do_not_depend_on_how_the_file_is_read(
    pieces: list[str | None], separator: str
) -> None:
    """None stands for the separator."""
    text = "".join(separator if piece is None else piece for piece in pieces).lstrip("\r\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_BLANKS", 2)
        between = Separator(separator)
        expected, at = [], 0
        while at < len(text):
            match = between.pattern.search(text.encode(), at)
            end, after = (match.start(), match.end()) if match else (len(text), len(text))
            expected.append((at, text[at:end].encode()))
            at = after + len(text[after:]) - len(text[after:].lstrip("\r\n"))
        for block, size in ((1, 1), (1, 1000), (7, 3), (1 << 17, 1000)):
            patch.setattr(module, "BLOCK_BYTES", block)
            read = []
            for section in sections(io.BytesIO(text.encode()), between):
                parts = iter(lambda: section.read(size), b"")  # noqa: B023
                read.append((section.offset, b"".join(parts)))
            assert read == expected


def test_long_sections_come_in_parts_with_the_byte_of_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", 64)
    monkeypatch.setattr(module, "BLOCK_BYTES", 32)
    long = "".join(f"line {n} é\n" for n in range(40))
    (tmp_path / "a.txt").write_text(f"{long}###{long}###end")
    parts = list(documents([tmp_path], separator="###"))
    names = list(dict.fromkeys(part.id for part in parts))
    assert len(names) == 3 < len(parts)
    joined = ["".join(part.text for part in parts if part.id == name) for name in names]
    assert joined == [long, long, "end"]
    assert [part.ends for part in parts].count(True) == 3
    content = (tmp_path / "a.txt").read_bytes()
    (tmp_path / "a.txt").write_bytes(content + b"\xff")
    with pytest.raises(DataError, match=f"not UTF-8 at byte {len(content)} "):
        texts(tmp_path, "###")


def test_one_file_of_stories_has_a_validation_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(STORIES))
    tokenizer = train_tokenizer(
        [tmp_path / "a.txt"], tmp_path / "tok", 300, document_separator="<|endoftext|>"
    )
    metas = prepare(
        [tmp_path / "a.txt"], tokenizer, tmp_path / "o", 64, validation_fraction=0.2,
        document_separator="<|endoftext|>",
    )  # fmt: skip
    assert sum(meta.documents for meta in metas.values()) == len(STORIES)
    both = [split_texts(tmp_path / "o" / split) for split in ("train", "validation")]
    assert sorted(both[0] + both[1]) == sorted(STORIES)


def test_an_empty_validation_split_is_refused_before_anything_is_tokenised(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(STORIES))
    monkeypatch.setattr("data_pipeline.prepare.write_unit", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(DataError, match=r"No document fell into the validation.*--document-sep"):
        prepare([tmp_path / "a.txt"], tokenizer_file, tmp_path / "o", 64, workers=1)
    (tmp_path / "a.jsonl").write_text('{"text": "only one"}\n')
    with pytest.raises(DataError, match="No document fell into the validation"):
        prepare([tmp_path / "a.jsonl"], tokenizer_file, tmp_path / "o", 64, workers=1)
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize("separator", ["  ", "x" * 5000, "\t"])
def test_what_separates_nothing_is_refused(separator: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="--document-separator"):
        texts(tmp_path, separator)
