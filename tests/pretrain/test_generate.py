"""Generation: what is sampled, what is reported, and how text streams out."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import (  # type: ignore[import-untyped]
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

from checkpoints_tools.single_gpu import ModelError, TransXSSM, TransXSSMConfig
from pretrain.generate import END_OF_TEXT, TextStream, choose, generate, run
from untrusted.text import without_controls

TEXT = "naïve café 東京 🙂🙃 plain words"


def make_model(vocab_size: int = 50, **changes: Any) -> TransXSSM:
    model = TransXSSM(
        TransXSSMConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            attn_layer_period=2,
            attn_layer_offset=1,
            tie_word_embeddings=False,  # a tied random model repeats its input
            **changes,
        )
    )
    model.reset_parameters(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(15)
    return model.eval()


def make_tokenizer() -> Tokenizer:
    """Byte-level, with no merges: every character outside ASCII takes several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = make_model(257, eos_token_id=0)
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(model.config.to_json())
    make_tokenizer().save(str(path / "tokenizer.json"))
    return path


# ------------------------------------------------------------------------------------ generate


def test_greedy_follows_the_argmax_of_full_forwards() -> None:
    model = make_model()
    token_ids, logprobs = generate(model, [3, 1, 4], 12)
    ids = [3, 1, 4]
    for token, logprob in zip(token_ids, logprobs, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert token == int(expected.argmax())
        assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
        ids.append(token)
    assert len(set(token_ids)) > 3


def test_sampling_is_reproducible_by_seed() -> None:
    model = make_model()
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "top_p": 0.95}
    first = generate(model, [1, 2], 20, seed=7, **options)
    assert generate(model, [1, 2], 20, seed=7, **options) == first
    assert generate(model, [1, 2], 20, seed=8, **options) != first
    assert generate(model, [1, 2], 20, **options) != generate(model, [1, 2], 20, **options)


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}], ids=str
)
def test_narrow_sampling_is_greedy(options: dict[str, Any]) -> None:
    model = make_model()
    options = {"temperature": 1.0, **options}
    assert generate(model, [5], 10, seed=3, **options) == generate(model, [5], 10)


def test_logprobs_ignore_temperature() -> None:
    model = make_model()
    token_ids, logprobs = generate(model, [9], 6, temperature=3.0, top_k=5, seed=1)
    with torch.no_grad():
        expected = model(torch.tensor([[9, *token_ids]]))[0].log_softmax(-1)
    for t, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        assert logprob == pytest.approx(float(expected[t, token]), abs=1e-4)


def test_generation_stops_at_end_of_text() -> None:
    model = make_model()
    token_ids, logprobs = generate(model, [3, 1, 4], 12)
    eos = token_ids[-1]
    stop = token_ids.index(eos) + 1
    seen: list[int] = []
    short = generate(model, [3, 1, 4], 12, eos_token_id=eos, on_token=seen.append)
    assert short == (token_ids[:stop], logprobs[:stop])
    assert seen == token_ids[:stop]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.6), (4, 1.0), (4, 0.8), (0, 1.0), (3, 0.05)])
def test_choice_follows_the_brute_force_distribution(top_k: int, top_p: float) -> None:
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, 1.2])
    temperature = 0.8
    kept: dict[int, float] = {i: math.exp(float(v) / temperature) for i, v in enumerate(logits)}
    best_first = sorted(kept, key=lambda i: -kept[i])[: top_k or None]
    total = sum(kept[i] for i in best_first)
    nucleus: list[int] = []
    for i in best_first:  # the fewest tokens that reach top_p
        nucleus.append(i)
        if sum(kept[j] for j in nucleus) / total >= top_p:
            break
    mass = sum(kept[i] for i in nucleus)
    rng, draws = torch.Generator().manual_seed(0), 3000
    counts = Counter(choose(logits, temperature, top_k, top_p, rng) for _ in range(draws))
    assert set(counts) == set(nucleus)
    for i in nucleus:
        assert counts[i] / draws == pytest.approx(kept[i] / mass, abs=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"prompt_ids": []}, "no tokens"),
        ({"prompt_ids": [50]}, "vocab_size=50"),
        ({"prompt_ids": [-1, 2]}, "from -1 to 2"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(make_model(), **{"prompt_ids": [1], "max_new_tokens": 2, **options})


def test_broken_weights_are_reported() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.final_layernorm.weight[0] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        generate(model, [1], 2)


# ------------------------------------------------------------------------------------ streaming


def test_stream_never_cuts_a_character() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) == len(TEXT.encode())
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert stream.flush() == ""


@pytest.mark.parametrize("seed", range(8))
def test_stream_of_any_bytes_joins_to_the_whole_decoding(seed: int) -> None:
    tokenizer = make_tokenizer()
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 257, (60,), generator=rng).tolist()
    ids = noise + tokenizer.encode(TEXT).ids + noise[:7]
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token_id) for token_id in ids) + stream.flush()
    assert text == tokenizer.decode(ids)


def test_stream_keeps_spaces_of_sentencepiece_style_decoders() -> None:
    words = ["▁hello", "▁wide", "▁wor", "ld"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="ld"))
    tokenizer.decoder = decoders.Metaspace()
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in range(4)] == ["hello", " wide", " wor", "ld"]


# ------------------------------------------------------------------------------------ run


def test_json_and_streamed_text_agree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "café", 24, json_output=True)
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["prompt_ids", "token_ids", "logprobs", "text"]
    tokenizer = make_tokenizer()
    assert record["prompt_ids"] == tokenizer.encode("café").ids
    assert 1 <= len(record["token_ids"]) <= 24
    assert len(record["logprobs"]) == len(record["token_ids"])
    assert all(logprob <= 0 for logprob in record["logprobs"])
    assert record["text"] == tokenizer.decode(record["token_ids"])
    run(folder, "café", 24)
    assert capsys.readouterr().out == without_controls(record["text"]) + "\n"


def test_empty_prompt_starts_from_end_of_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, "", 2, json_output=True)
    assert json.loads(capsys.readouterr().out)["prompt_ids"] == [0]


def test_prompt_that_spells_a_special_token_stays_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, END_OF_TEXT, 1, json_output=True)
    assert len(json.loads(capsys.readouterr().out)["prompt_ids"]) == len(END_OF_TEXT)


def test_going_past_the_positions_warns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "é" * 2050, 1)
    assert "max_position_embeddings" in capsys.readouterr().err


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        run(tmp_path, "x")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a Hugging Face tokenizer"):
        run(tmp_path, "x")


def test_escapes_that_a_model_writes_do_not_reach_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(8):  # a model of bytes, whose text has controls among them
        run(folder, "a", max_new_tokens=40, temperature=2.0, seed=seed)
    text = capsys.readouterr().out
    assert "\\x" in text
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in text)
