"""Data without a loss is refused, and a run without one does not end as done."""

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers  # type: ignore[import-untyped]

from data_pipeline.errors import DataError
from data_pipeline.inspection import verify_dataset
from data_pipeline.merge import Totals
from data_pipeline.prepare import prepare
from pretrain.sources import open_data
from tests.data_pipeline.lossy import CHINESE, letters, write
from tests.pretrain.command import paragraph, run_command
from tests.pretrain.test_bad_steps import train
from tests.tiny import tiny_config


@pytest.fixture
def without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data of end-of-text tokens alone, as earlier versions have prepared it."""
    monkeypatch.setattr(Totals, "check", lambda _: None)
    words = pre_tokenizers.WhitespaceSplit()
    tokenizer = letters(tmp_path / "t.json", pre_tokenizer=words)
    corpus = write(tmp_path, CHINESE * 100)
    prepare([corpus], tokenizer, tmp_path / "data", 64, validation_fraction=0.3, max_lost=1)
    return tmp_path / "data"


def test_data_in_which_no_token_has_a_loss_is_refused(without_loss: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data/train: none of its [\d,]+ tokens has a loss"):
        verify_dataset(without_loss)
    with pytest.raises(DataError, match=r"data/train: none of its [\d,]+ tokens has a loss"):
        open_data(tiny_config(without_loss, tmp_path / "run"))


def test_a_run_without_a_finite_loss_does_not_end_as_done(tiny_data: Path, tmp_path: Path) -> None:
    config, (first,) = train(tmp_path, tiny_data, [1], training={"steps": 1})
    (again,) = run_command("pretrain", config)
    for end in (first, again):
        assert end.code == 1, end.output
        assert "no step of this run, of 1, had a finite loss" in paragraph(end.output)
