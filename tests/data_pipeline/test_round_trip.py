"""What a tokenizer loses of a corpus is said before it is tokenised."""

import gzip
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import models, normalizers, pre_tokenizers  # type: ignore[import-untyped]

from data_pipeline.corpus import units
from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.round_trip import check_round_trip, round_trip, sample
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.unit import Options
from tests.data_pipeline.lossy import CHINESE, ENGLISH, letters, write


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(), models.BPE(unk_token="<unk>"), models.WordPiece(unk_token="<unk>"),
        models.Unigram(), models.WordLevel(unk_token="<unk>"),
    ],
    ids=["BPE without unk", "BPE", "WordPiece", "Unigram", "WordLevel"],
)  # fmt: skip
def test_a_tokenizer_that_loses_the_text_is_refused_before_the_work(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, corpus = letters(tmp_path / "t.json", model), write(tmp_path, CHINESE * 100)
    monkeypatch.setattr("data_pipeline.prepare.write_unit", lambda *_: pytest.fail("tokenised"))
    message = (
        r"t\.json: 100\.00% of 1,\d00 characters are lost .*200 texts.*0\.10% that may be "
        r"lost; '状态.*comes back as '[ ▁]*'.*--max-lost-characters"
    )
    with pytest.raises(DataError, match=message):
        prepare([corpus], tokenizer, tmp_path / "o", 64, workers=1)
    assert not list(tmp_path.glob("o*"))


def test_the_share_of_lost_characters_is_told_and_may_be_allowed(tmp_path: Path) -> None:
    tokenizer, said = letters(tmp_path / "t.json"), []
    corpus = write(tmp_path, [ENGLISH + " é"] * 50)
    with pytest.raises(DataError, match=r"3\.70%.*'é' comes back as '[ ▁]*'"):
        prepare([corpus], tokenizer, tmp_path / "o", 64)
    prepare([corpus], tokenizer, tmp_path / "o", 64, max_lost=0.04, tell=said.append)
    assert "3.70% of 1,350 characters are lost" in said[1]


def test_documents_of_no_token_are_no_data(tmp_path: Path) -> None:
    words = pre_tokenizers.WhitespaceSplit()
    tokenizer = letters(tmp_path / "t.json", pre_tokenizer=words)
    corpus = write(tmp_path, CHINESE * 100)
    with pytest.raises(DataError, match="In the train split no token has a loss"):
        prepare([corpus], tokenizer, tmp_path / "o", 64, max_lost=1)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"normalizer": normalizers.NFC()},
        {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])},
    ],
    ids=["plain", "NFC", "NFKC lower"],
)
def test_writing_a_character_differently_loses_none(parts: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(letters(tmp_path / "t.json", **parts))
    text = ENGLISH.title() if "Lowercase" in str(parts) else ENGLISH
    assert round_trip(tokenizer, [f" {text}  {text}\n"]).lost == 0


def test_letters_of_the_unknown_token_are_not_taken_for_the_text(tmp_path: Path) -> None:
    model = models.WordLevel(unk_token="<unk>")
    tokenizer = load_tokenizer(letters(tmp_path / "t.json", model))
    found = round_trip(tokenizer, ["nuk knu <unk>"])
    assert (found.characters, found.lost) == (11, 11)


def test_a_byte_level_tokenizer_loses_nothing(tokenizer_file: Path) -> None:
    texts = ["日本 🙂 é \x00 <|endoftext|> \u00a0 e\u0301", *CHINESE]
    found = round_trip(load_tokenizer(tokenizer_file), texts)
    assert (found.texts, found.lost) == (3, 0)


def test_the_sample_of_a_large_corpus_is_from_all_over_it(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.round_trip.SAMPLE_CHARACTERS", 4000)
    corpus = write(tmp_path, [f"{n:06} " + "x" * 93 for n in range(3000)])
    options = Options(64, "best_fit", 0.0, "text", 0, 1 << 20, "mds")
    for unit_bytes in (1 << 30, 5000):
        pieces = [piece for unit in units([corpus], unit_bytes) for piece in unit]
        found = [int(text[:6]) for text in sample(pieces, options)]
        assert len(found) >= 32
        assert max(found) > 2800
        assert max(b - a for a, b in pairwise(found)) < 120
    lost = {str(number): [piece] for number, piece in enumerate(pieces)}
    assert check_round_trip(lost, load_tokenizer(tokenizer_file), options, 0).lost == 0


def test_the_sample_of_a_small_corpus_has_every_text_once(tmp_path: Path) -> None:
    """Beside a compressed file, too."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, open_file in (("a.jsonl", open), ("b.json.gz", gzip.open)):
        with open_file(folder / name, "wt") as file:
            file.writelines(f'{{"text": "{name} {n} {"x" * 60}"}}\n' for n in range(200))
    options = Options(64, "best_fit", 0.0, "text", 0, 1 << 20, "mds")
    found = list(sample([piece for unit in units([folder], 1 << 30) for piece in unit], options))
    assert len(found) == len(set(found)) == 400
