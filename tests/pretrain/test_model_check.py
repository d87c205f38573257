"""Models that are probably not what was meant: a warning at the start and in the estimate."""

import re
from pathlib import Path
from typing import Any

import pytest

from parallel.config import ModelConfig
from pretrain.estimate import Job
from pretrain.estimate_report import run
from pretrain.model_check import model_warnings, tokens_of_data
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 5}, "none of the 5 layers is attention: .* use an offset of at most 4"),
        ({"num_layers": 7}, "the first would be layer 7, counted from 0"),
        ({"num_layers": 8, "attn_layer_period": 4}, "use an offset of at most 3"),
        ({"num_layers": 8, "attn_layer_period": 7}, "set model.attn_layer_offset=7, the period"),
        ({"num_layers": 2, "attn_layer_period": 1}, "use an offset of at most 0"),
        ({"num_layers": 8, "attn_layer_offset": 9}, "model.attn_layer_offset=9 no layer is"),
        ({"num_layers": 8}, None),
        ({"num_layers": 5, "attn_layer_offset": 4}, None),
        ({"num_layers": 5, "attn_layer_offset": 8}, None),
        ({"num_layers": 8, "attn_layer_period": 1, "attn_layer_offset": 0}, None),
    ],
)
def test_model_without_attention_by_accident_is_reported(
    fields: dict[str, Any], message: str | None
) -> None:
    found = model_warnings(ModelConfig(**fields), None)
    if message is None:
        assert found == []
    else:
        (warning,) = found
        assert re.search(message, warning), warning


@pytest.mark.parametrize(
    ("vocab_size", "tokens", "is_reported"),
    [(8192, 300, True), (50304, 50257, False), (8192, 8000, False), (1024, 300, False),
     (128256, 32000, True), (8192, None, False)],
)  # fmt: skip
def test_vocabulary_far_larger_than_the_tokenizers_is_reported(
    vocab_size: int, tokens: int | None, is_reported: bool
) -> None:
    model = ModelConfig(vocab_size=vocab_size, hidden_size=10)
    found = model_warnings(model, tokens)
    assert bool(found) == is_reported
    if is_reported:
        assert f"{(vocab_size - (tokens or 0)) * 10:,} parameters" in found[0]
        assert f"set model.vocab_size={tokens}" in found[0]


def test_estimate_warns_of_the_model(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"num_layers": 1, "vocab_size": 4096}
    config = tiny_config(tiny_data, tmp_path / "run", model=model)
    assert tokens_of_data(config) == 300
    assert tokens_of_data(tiny_config(tmp_path, tmp_path / "run")) is None
    run(config, Job(1, 1, 80 << 30, "h100"), search=False, as_json=True)
    printed = capsys.readouterr().err
    assert "none of the 1 layers is attention" in printed
    assert "the data's tokenizer has 300 tokens" in printed
