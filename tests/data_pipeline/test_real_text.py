"""Published text and a published tokenizer, as they are."""

import json
from pathlib import Path

import pytest

from benchmarks.corpora import OUT, CorpusError, corpus, neox_tokenizer
from benchmarks.packing import cut_documents, needless_cuts
from data_pipeline.dataset import PackedDataset
from data_pipeline.packing import Packing
from data_pipeline.prepare import prepare
from data_pipeline.reading import documents
from data_pipeline.tokenizer import inspect_tokenizer, load_tokenizer
from tests.conftest import missing

SEQ_LEN = 8192
HELLO_WORLD = [12092, 1533]  # as published


@pytest.fixture(scope="module")
def place() -> Path:
    """A folder with the corpus "python" (11 MB, PSF licence) and GPT-NeoX-20B's tokenizer."""
    try:
        corpus("python")
        neox_tokenizer()
    except CorpusError as error:
        missing(str(error))
    return OUT


def test_the_tokenizer_is_what_was_published(place: Path) -> None:
    tokenizer = load_tokenizer(neox_tokenizer())
    assert (tokenizer.end_of_text, tokenizer.eod_id) == ("<|endoftext|>", 0)
    assert tokenizer.encode_batch(["Hello world"]) == [HELLO_WORLD]
    found = inspect_tokenizer(tokenizer.file, "naïve 🙂 <|endoftext|>")
    assert found["round_trip"]


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_every_token_of_the_text_arrives(packing: Packing, place: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(neox_tokenizer())
    text = corpus("python")
    meta = prepare(
        [text], tokenizer.file, tmp_path / "o", SEQ_LEN, packing, validation_fraction=0, workers=1
    )["train"]
    texts = [document.text for document in documents([text])]
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
    assert (meta.documents, meta.tokens) == (len(texts), sum(lengths))
    dataset = PackedDataset(tmp_path / "o/train")
    if packing == "best_fit":
        assert meta.tokens / (meta.tokens + meta.padding) > 0.995
        assert meta.cut_documents == sum(length > SEQ_LEN + 1 for length in lengths)
        assert needless_cuts(dataset) == 0
    else:
        cut, fitting = cut_documents(dataset)
        assert cut == meta.cut_documents > sum(length > SEQ_LEN + 1 for length in lengths)
        assert fitting > 0
    first = json.loads(text.read_text().splitlines()[0])["text"]
    if packing == "concat":
        head = dataset[0].tokens[: min(lengths[0] - 1, 1000)].tolist()
        assert first.startswith(tokenizer.decode(head))
