"""Tokenizers that know few characters, and text that they lose."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (  # type: ignore[import-untyped]
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

ENGLISH = "the state of a scan mixes in time"
CHINESE = ["状态空间模型🙂 ", "注意力机制 🚀"]


def letters(path: Path, model: Any = None, **parts: Any) -> Path:
    """A tokenizer of a few words that knows no other character."""
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    kind = {"BPE": trainers.BpeTrainer, "WordPiece": trainers.WordPieceTrainer,
            "Unigram": trainers.UnigramTrainer, "WordLevel": trainers.WordLevelTrainer}  # fmt: skip
    special = ["<|endoftext|>", "<unk>"]
    options = {"unk_token": "<unk>"} if isinstance(tokenizer.model, models.Unigram) else {}
    trainer = kind[type(tokenizer.model).__name__](
        vocab_size=80, special_tokens=special, show_progress=False, **options
    )
    tokenizer.train_from_iterator([ENGLISH], trainer)
    tokenizer.save(str(path))
    return path


def write(folder: Path, texts: list[str]) -> Path:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(rows)
    return folder / "corpus.jsonl"
