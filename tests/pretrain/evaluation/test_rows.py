"""Rows that count every token of a text once, and what tokens stand for."""

import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from data_pipeline import reading
from data_pipeline.batch import Batch
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer
from parallel.sums import Key, sums_by
from pretrain.config import ConfigError
from pretrain.evaluation import command
from pretrain.evaluation.probes import DEPTHS, lengths_to, needle, recall
from pretrain.evaluation.rows import Row, score_rows, text_rows
from pretrain.evaluation.scores import Scores, by_bins, position_bins, token_bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Path(__file__)], folder, 300)
    return load_tokenizer(folder).tokenizer


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=60), size=st.integers(1, 12))
def test_windows_are_those_of_the_harness(ids: list[int], size: int) -> None:
    expected = [
        make_disjoint_window(window)
        for window in get_rolling_token_windows(
            ids, prefix_token=77, max_seq_len=size, context_len=1
        )
    ]
    rows = list(text_rows(ids, 77, size))
    found = [(list(row.ids[: row.counts.start]), [row.ids[i] for i in row.counts]) for row in rows]
    assert found == [(list(context), list(counted)) for context, counted in expected]
    assert all(row.length <= size for row in rows)


def test_a_long_text_takes_a_few_bytes_a_token(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", 1 << 14)
    monkeypatch.setattr(command, "PIECE", 1 << 12)
    text = "import Path\n" * 50_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("what the limit leaves out")
    model: Any = SimpleNamespace(tokenizer=tokenizer, end_of_text=0, max_length=64)
    tracemalloc.start()
    try:
        (ids,), size = command._text_ids(model, str(tmp_path), "text", command.Asked(limit=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == len(text.encode())
    assert list(ids[:40]) == tokenizer.encode(text[:400]).ids[:40]
    assert max(ids) > 256  # of which Python makes an object each
    assert peak < 12 * len(ids)
    counted = [row.ids[i] for row in text_rows(ids, 0, 64) for i in row.counts]
    assert counted == list(ids)


def test_pieces_of_a_text_end_with_lines_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PIECE", 4)
    for text, pieces in (
        ("", []), ("abcd", ["abcd"]), ("a\nbcd", ["a\n", "bcd"]),
        ("\nabcdefg", ["\n", "abcd", "efg"]),
        ("\n\n\n\n\n", ["\n\n\n\n", "\n"]),
    ):  # fmt: skip
        assert list(command._pieces(text)) == pieces


def test_rows_are_scored_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(_: Any, rows: Sequence[Row]) -> list[Scores]:
        sizes.append(len(rows))
        return [Scores(0.5, 1, 1, 2) for _ in rows]

    sizes: list[int] = []
    monkeypatch.setattr(command, "score_rows", score)
    monkeypatch.setattr(command, "ROWS_AT_ONCE", 4)
    rows = (Row([0, 1], range(1, 2)) for _ in range(9))
    assert command._scored(SimpleNamespace(), rows) == Scores(4.5, 9, 9, 18)  # type: ignore[arg-type]
    assert sizes == [4, 4, 1]


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_tokens_stand_for_the_bytes_of_their_text(tokenizer: Tokenizer, text: str) -> None:
    sizes = token_bytes(tokenizer, tokenizer.get_vocab_size())
    ids = tokenizer.encode(text).ids
    assert sizes[ids].sum() == len(text.encode())
    assert sizes[tokenizer.token_to_id("<|endoftext|>")] == 0


def test_bytes_of_tokens_that_spell_characters() -> None:
    vocabulary = {"<unk>": 0, "▁": 1, "▁né": 2, "<0xE2>": 3, "a": 4}
    spelling = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    spelling.pre_tokenizer = pre_tokenizers.Metaspace()
    spelling.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    spelling.add_special_tokens(["<unk>"])
    assert token_bytes(spelling, 6).tolist() == [0, 1, 4, 1, 1, 0]
    assert token_bytes(spelling, 3).tolist() == [0, 1, 4]


def test_bins_double() -> None:
    assert position_bins(100) == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert position_bins(5) == [(0, 5)]
    table = torch.zeros(4, 100)
    table[:, 20] = torch.tensor([3.0, 2.0, 1.0, 4.0])
    assert by_bins(table) == {(16, 32): Scores(3.0, 2, 1, 4)}
    assert Scores.of(table).loss == 1.5
    assert Scores.of(table).accuracy == 0.5
    assert Scores.of(table).bits_per_byte == pytest.approx(3 / 4 / math.log(2))


class Induction:
    """Sure of the token that followed the last time the same two tokens stood together (of keys:
    one); else it has no idea."""

    name, max_length, length_multiple = "induction", 256, 3

    def __init__(self, tokenizer: Tokenizer, suffix: int, rank: int = 0, ranks: int = 1) -> None:
        self.tokenizer, self.suffix = tokenizer, suffix
        self.vocab_size, self.end_of_text = tokenizer.get_vocab_size(), 0
        self.tokenizer_json = b""
        self.data_rank, self.data_ranks = rank, ranks

    def sums(self, batches: Sequence[Batch], key: Key, size: int) -> Tensor:
        table = torch.zeros(4, size, dtype=torch.float64)
        for batch in batches:
            nats = torch.full(batch.tokens.shape, math.log(self.vocab_size))
            missed = torch.ones(batch.tokens.shape)
            for row, (tokens, labels) in enumerate(
                zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
            ):
                followed: dict[tuple[int, ...], int] = {}
                for t in range(self.suffix - 1, len(tokens)):
                    seen = tuple(tokens[t - self.suffix + 1 : t + 1])
                    if followed.get(seen) == labels[t]:
                        nats[row, t], missed[row, t] = 0.0, 0.0
                    followed[seen] = labels[t]
            weights = torch.ones(self.vocab_size, dtype=torch.float64)
            by_token = (nats.reshape(-1), missed.reshape(-1))
            table += sums_by(batch, key, size, weights, *by_token)
        return table


def test_every_row_has_its_own_score(tokenizer: Tokenizer) -> None:
    rows = [Row([5] * n, range(max(1, n - 3), n)) for n in (2, 200, 7, 4, 256, 31)]
    scores = score_rows(Induction(tokenizer, 1), rows)
    assert [score.tokens for score in scores] == [len(row.counts) for row in rows]
    # the first repetition is not foreseen, all others are
    assert [score.missed for score in scores] == [1, 0, 0, 1, 0, 0]


def test_ranks_share_rows_out(tokenizer: Tokenizer) -> None:
    rows = [Row([5] * n, range(1, n)) for n in range(2, 40)]
    whole = score_rows(Induction(tokenizer, 1), rows)
    shares = [score_rows(Induction(tokenizer, 1, rank, 3), rows) for rank in range(3)]
    for row, one in enumerate(whole):
        assert sum(share[row].tokens for share in shares) == one.tokens
        assert sum(share[row].nats for share in shares) == pytest.approx(one.nats)


def test_needle_is_found_by_a_model_that_repeats(tokenizer: Tokenizer) -> None:
    hay = tokenizer.encode("the grass is as high as an elephant's eye " * 60).ids
    cells = needle(Induction(tokenizer, 6), hay, cases=2, seed=3)
    assert {(cell.row, cell.column) for cell in cells} == {
        (depth, length) for depth in DEPTHS for length in lengths_to(256)
    }
    assert min(cell.found for cell in cells) > 0.7
    assert min(cell.gain for cell in cells) > 2
    with pytest.raises(ConfigError, match="give more text"):
        needle(Induction(tokenizer, 6), hay[:100], cases=1)


def test_pairs_are_recalled_by_a_model_that_repeats(tokenizer: Tokenizer) -> None:
    cells = recall(Induction(tokenizer, 1), cases=2, seed=3)
    assert {cell.row for cell in cells} >= {4, 16}
    assert all(cell.found == 1 for cell in cells)
    assert all(cell.gain == pytest.approx(math.log(300), rel=0.01) for cell in cells)
