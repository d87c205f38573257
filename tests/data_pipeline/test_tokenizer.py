import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_tools.single_gpu import ModelError
from checkpoints_tools.tokenizer_file import parse_tokenizer
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import _texts as texts_of
from data_pipeline.tokenizer import inspect_tokenizer, load_tokenizer, train_tokenizer


def test_training_twice_gives_the_same_bytes(corpus, tokenizer_file, tmp_path):
    again = train_tokenizer([corpus], tmp_path, 300)
    assert again == tmp_path / "tokenizer.json"
    assert again.read_bytes() == tokenizer_file.read_bytes()


def test_short_texts_lose_no_character(corpus, monkeypatch):
    whole = list(texts_of([corpus], "text"))
    monkeypatch.setattr("data_pipeline.tokenizer.CHUNK", 50)
    cut = list(texts_of([corpus], "text"))
    assert max(map(len, cut)) == 50
    assert "".join(cut) == "".join(whole)


def test_very_long_words_are_cut_for_training(tmp_path):
    text = "some words " * 100 + "x" * 1200 + "\n" + "é" * 600 + " end"
    (tmp_path / "a.txt").write_text(text)
    cut = list(texts_of([tmp_path], "text"))
    assert "".join(cut) == text
    assert [len(part.split()[-1]) for part in cut] == [512, 512, 512, 3]


def test_special_tokens_have_their_ids(tokenizer_file):
    loaded = load_tokenizer(tokenizer_file)
    assert (loaded.eod_id, loaded.pad_id, loaded.vocab_size) == (0, 1, 300)
    assert load_tokenizer(tokenizer_file.parent).hash == loaded.hash


def test_text_round_trips(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)

    @settings(deadline=None, max_examples=100)
    @given(st.text())
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text

    check()


def test_end_of_text_spelt_in_a_text_is_text(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    (ids,) = tokenizer.encode_batch(["a <|endoftext|> b <|padding|>"])
    assert not {tokenizer.eod_id, tokenizer.pad_id} & set(ids)


def test_inspect_tells_what_a_person_wants_to_know(tokenizer_file):
    found = inspect_tokenizer(tokenizer_file, "the state of a scan")
    assert found["round_trip"] is True
    assert found["vocab_size"] == 300
    assert found["special_tokens"] == {"<|endoftext|>": 0, "<|padding|>": 1}
    assert found["bytes_per_token"] > 1


def test_inspect_takes_the_end_of_text_that_it_asks_for(tokenizer_file, tmp_path):
    other = tokenizer_file.read_text().replace("<|endoftext|>", "<|fin|>")
    (tmp_path / "tokenizer.json").write_text(other)
    with pytest.raises(DataError, match=r"--end-of-text \(special tokens: <\|fin\|>"):
        inspect_tokenizer(tmp_path, "text")
    assert inspect_tokenizer(tmp_path, "text", "<|fin|>")["eod_id"] == 0


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="a pipe, not a file"):
        load_tokenizer(tmp_path)


def test_a_trained_tokenizer_is_written_through_no_link(tmp_path, corpus):
    (tmp_path / "outside").write_text("kept")
    for name in ("tokenizer.json", "tokenizer.json.tmp", ".tokenizer.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "outside")
    assert load_tokenizer(train_tokenizer([corpus], tmp_path, 258)).eod_id == 0
    assert (tmp_path / "outside").read_text() == "kept"


def test_bad_tokenizers_are_refused(tmp_path, corpus):
    with pytest.raises(DataError, match="no tokenizer there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="at least 258"):
        train_tokenizer([corpus], tmp_path, 200)


def test_a_tokenizer_over_which_its_library_panics_is_refused(tmp_path, corpus):
    path = train_tokenizer([corpus], tmp_path, 300)
    described = json.loads(path.read_text())
    described["model"]["continuing_subword_prefix"] = "a long prefix"
    path.write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer\.json \(byte index"):
        load_tokenizer(path)
    with pytest.raises(ModelError, match=r"is not a Hugging Face tokenizer: byte index"):
        parse_tokenizer(path.read_bytes(), path)


def test_a_link_in_the_way_is_replaced_and_not_written_through(corpus, tmp_path):
    (tmp_path / "keys").write_text("keep")
    for name in ("t.json", "t.json.tmp", ".t.json.tmp"):
        (tmp_path / name).symlink_to("keys")
    file = train_tokenizer([corpus], tmp_path / "t.json", 300)
    assert not file.is_symlink()
    assert (tmp_path / "keys").read_text() == "keep"


def test_ids_that_no_vocabulary_has_are_refused(tokenizer_file, tmp_path):
    content = json.loads(tokenizer_file.read_text())
    content["model"]["vocab"]["BIG"] = 4294967290
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json: its largest token id is 4,294,967,290;"):
        load_tokenizer(tmp_path)
