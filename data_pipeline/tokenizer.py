"""Byte-level BPE tokenizers: train, load, inspect (Hugging Face `tokenizers`).

Any text round-trips: every byte is a token of its own before the merges. Token 0 ends a document,
token 1 is padding.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # type: ignore[import-untyped]

from data_pipeline.errors import DataError
from data_pipeline.reading import TextField, documents
from parallel import bounds
from untrusted.errors import UnsafeFileError, check_refusal
from untrusted.files import read_regular, write_durably
from untrusted.text import printable
from untrusted.tokenizer_json import as_in_training, differing_parts

END_OF_TEXT = "<|endoftext|>"
# of GPT-2 and GPT-NeoX; Llama 3; Llama 2; Gemma
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
PADDING = "<|padding|>"
MIN_VOCAB_SIZE = 256 + 2
CHUNK = 1 << 16
LONG_WORD = re.compile(r"\S{512}")
MAX_BYTES = 1 << 28  # of a file; those of 256,000 tokens have some 35 MB


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer, its file's hash and the token ids that packing needs."""

    tokenizer: Tokenizer
    file: Path
    hash: str
    vocab_size: int
    end_of_text: str
    eod_id: int
    pad_id: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. What spells a special token inside a text is plain text."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def train_tokenizer(
    inputs: Sequence[Path | str],
    out: Path,
    vocab_size: int,
    text_field: TextField = "text",
    *,
    document_separator: str = "",
    strict: bool = False,
) -> Path:
    """Train on the corpus `inputs` and write `out` (a .json file, or a folder to hold one).

    text_field, document_separator, strict: how inputs become documents [see documents in
    reading.py]. Reads the corpus as a stream; the same corpus gives the same file. A small corpus
    may fill less than `vocab_size`. Returns the file's path. Raises DataError for a bad corpus or
    size.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: 256 bytes and 2 "
            f"special tokens need at least {MIN_VOCAB_SIZE}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = _texts(inputs, text_field, separator=document_separator, strict=strict)
    tokenizer.train_from_iterator(texts, trainer)

    file = out if out.suffix == ".json" else out / "tokenizer.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, tokenizer.to_str(pretty=True).encode())
    return file


def _texts(
    inputs: Sequence[Path | str],
    text_field: TextField,
    *,
    separator: str = "",
    strict: bool = False,
) -> Iterator[str]:
    """The corpus in short texts: the library holds 256 of them at a time, however long.

    They are cut within what would be a very long word, as of base64: every merge goes through all
    of each word that has its pair, so long ones without end would keep the trainer for hours.
    """
    for document in documents(inputs, text_field, separator=separator, strict=strict):
        for at in range(0, len(document.text), CHUNK):
            text, begin = document.text[at : at + CHUNK], 0
            for word in LONG_WORD.finditer(text):
                yield text[begin : word.end()]
                begin = word.end()
            yield text[begin:]


def load_tokenizer(path: Path, end_of_text: str | None = None) -> TextTokenizer:
    """The tokenizer at `path`: a tokenizer.json or a folder that holds one.

    end_of_text: the token that ends documents [the first of KNOWN_ENDS that it has]; without
    `<|padding|>` that one also pads.
    Raises DataError when it is missing, unreadable or lacks the end-of-text token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    data = read_tokenizer(file)
    tokenizer = as_in_training(parse_tokenizer(data, str(file)))
    names = KNOWN_ENDS if end_of_text is None else (end_of_text,)
    end = next((name for name in names if tokenizer.token_to_id(name) is not None), None)
    if end is None:
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        shown = ", ".join(special[:20]) or "none"
        raise DataError(
            f"{file}: has no token {' or '.join(map(repr, names))}, which ends every document; "
            f"name another with --end-of-text (special tokens: {shown})."
        )
    eod_id = tokenizer.token_to_id(end)
    pad_id = tokenizer.token_to_id(PADDING)
    return TextTokenizer(
        tokenizer=tokenizer,
        file=file,
        hash=hashlib.sha256(data).hexdigest(),
        vocab_size=vocab_size_of(tokenizer),
        end_of_text=end,
        eod_id=eod_id,
        pad_id=eod_id if pad_id is None else pad_id,
    )


def read_tokenizer(file: Path) -> bytes:
    """Return the content of a tokenizer.json. Raises DataError."""
    try:
        return read_regular(file, MAX_BYTES, follow_link=True)
    except UnsafeFileError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(
            f"{file}: no tokenizer there ({error.strerror}). Train one with `transxssm tokenizer "
            "train`, or name a Hugging Face tokenizer.json."
        ) from error


def parse_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, whose `name` messages say.

    Raises DataError for what is none, and for token ids beyond the largest vocabulary.
    """
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as error:  # the library raises bare Exception, and panics
        check_refusal(error)
        reason = printable(str(error))[:300]
        raise DataError(f"{name}: not a Hugging Face tokenizer.json ({reason}).") from error
    vocab_size = vocab_size_of(tokenizer)
    if not 1 <= vocab_size <= bounds.VOCABULARY:
        raise DataError(
            f"{name}: its largest token id is {vocab_size - 1:,}; a vocabulary has at least one "
            f"token and at most {bounds.VOCABULARY:,}. Restore the file, or number its tokens from "
            "0 on."
        )
    return tokenizer


def differing_tokenizers(one: bytes, other: bytes, names: tuple[str, str]) -> list[str]:
    """Names of what differs between two tokenizer.json of what decides ids; none if they are the
    same tokenizer. Raises DataError, naming the file, for what is none."""
    if one == other:
        return []
    return differing_parts(parse_tokenizer(one, names[0]), parse_tokenizer(other, names[1]))


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """Return the largest token id and 1 more: ids may have gaps. 0 without tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def inspect_tokenizer(path: Path, text: str, end_of_text: str | None = None) -> dict[str, Any]:
    """What `transxssm tokenizer inspect` prints, with `text` as the sample.

    Raises DataError as load_tokenizer does.
    """
    loaded = load_tokenizer(path, end_of_text)
    (ids,) = loaded.encode_batch([text])
    return {
        "file": str(loaded.file),
        "sha256": loaded.hash,
        "vocab_size": loaded.vocab_size,
        "special_tokens": {
            token.content: token_id
            for token_id, token in sorted(loaded.tokenizer.get_added_tokens_decoder().items())
            if token.special
        },
        "eod_id": loaded.eod_id,
        "pad_id": loaded.pad_id,
        "sample_tokens": len(ids),
        "bytes_per_token": len(text.encode()) / max(1, len(ids)),
        "round_trip": loaded.decode(ids) == text,
    }
