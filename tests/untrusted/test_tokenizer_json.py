"""What decides ids is told from what does not, however a tokenizer.json is written."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import (  # type: ignore[import-untyped]
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from untrusted.tokenizer_json import as_in_training, differing_parts, identity

END = "<|endoftext|>"


def tokenizer() -> Tokenizer:
    vocab = {END: 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5, "A": 6}
    made = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([END])
    return made


def add_tokens(made: Tokenizer) -> None:
    made.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )


def drop_out(made: Tokenizer) -> None:
    made.model.dropout = 0.5


INERT: dict[str, Callable[[Tokenizer], Any]] = {
    "post_processor": add_tokens,
    "truncation": lambda made: made.enable_truncation(2),
    "padding": lambda made: made.enable_padding(length=50),
    "dropout": drop_out,
    "decoder": lambda made: setattr(made, "decoder", decoders.Fuse()),
}


@pytest.mark.parametrize("what", INERT)
def test_what_does_not_decide_ids_makes_no_other_tokenizer(what: str) -> None:
    plain, other = tokenizer(), tokenizer()
    INERT[what](other)
    other = Tokenizer.from_str(other.to_str())
    assert differing_parts(plain, other) == []
    assert identity(plain) == identity(other)
    ids = [plain.encode("abcab", add_special_tokens=False).ids] * 20
    as_in_training(other)
    assert [other.encode("abcab", add_special_tokens=False).ids for _ in range(20)] == ids


def test_how_the_file_is_written_makes_no_other_tokenizer() -> None:
    described = json.loads(tokenizer().to_str())
    described["model"]["merges"] = [" ".join(pair) for pair in described["model"]["merges"]]
    for name in ("ignore_merges", "byte_fallback"):  # which older versions do not write
        described["model"].pop(name)
    text = json.dumps(dict(reversed(described.items())), indent=3, ensure_ascii=False)
    assert differing_parts(tokenizer(), Tokenizer.from_str(text)) == []


def other_merges(described: Any) -> None:
    described["model"]["merges"] = [["a", "b"]]


def other_vocabulary(described: Any) -> None:
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


DECIDING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "merges": ("model", other_merges),
    "ids": ("model", other_vocabulary),
    "normalizer": ("normalizer", lambda d: d.update(normalizer={"type": "Lowercase"})),
    "prefix": ("pre_tokenizer", lambda d: d["pre_tokenizer"].update(add_prefix_space=True)),
    "stripping": ("added_tokens", lambda d: d["added_tokens"][0].update(lstrip=True)),
    "special": ("added_tokens", lambda d: d["added_tokens"][0].update(special=False)),
}


@pytest.mark.parametrize("what", DECIDING)
def test_what_decides_ids_makes_another_tokenizer_and_is_named(what: str) -> None:
    part, change = DECIDING[what]
    described = json.loads(tokenizer().to_str())
    change(described)
    assert differing_parts(tokenizer(), Tokenizer.from_str(json.dumps(described))) == [part]


def test_an_added_token_makes_another_tokenizer() -> None:
    other = tokenizer()
    other.add_tokens([AddedToken("<|im_start|>")])
    assert differing_parts(tokenizer(), other) == ["added_tokens"]
    lower = tokenizer()
    lower.normalizer = normalizers.Lowercase()
    assert differing_parts(lower, other) == ["normalizer", "added_tokens"]
