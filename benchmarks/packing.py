"""How full packed sequences are, and how many documents are cut for it, on real text.

    python -m benchmarks.packing [--corpora data/corpora]

Prepares the corpora of `python -m benchmarks.corpora` (which it downloads) with GPT-NeoX-20B's
tokenizer, for sequences of 1,024 and 8,192 tokens, by best fit and by concatenating and cutting.
Counted from the finished shards: documents that lie in more than one sequence, and those among them
that would have fitted into one. Beside it, prepare's speed against the tokenizer alone.

Exits with 1 when best fit fills less than 99.5 % or cuts a document that fits, or prepare has less
than 80 % of the tokenizer's speed.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.corpora import CORPORA, OUT, corpus, neox_tokenizer
from data_pipeline.dataset import PackedDataset
from data_pipeline.packing import Packing
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import load_tokenizer

FILL, SPEED = 0.995, 0.8
REPEATS = 3


def pieces(dataset: PackedDataset) -> Iterator[tuple[int, bool]]:
    """(tokens, whether the end-of-text token is at its end) of every piece, in order."""
    eod = dataset.meta.eod_id
    for at in range(0, len(dataset), 256):
        for sample in dataset.read(np.arange(at, min(at + 256, len(dataset)))):
            ends = np.cumsum(sample.doc_lens)
            ends = ends[:-1] if sample.num_pad else ends
            sizes = np.diff(ends, prepend=0)
            yield from zip(sizes.tolist(), (sample.tokens[ends - 1] == eod).tolist(), strict=True)


def cut_documents(dataset: PackedDataset) -> tuple[int, int]:
    """Of a concatenated dataset, whose pieces are in the documents' order: documents in more than
    one sequence, and those of them no longer than a sequence."""
    cut = fitting = size = parts = 0
    for tokens, ended in pieces(dataset):
        size, parts = size + tokens, parts + 1
        if ended:
            cut += parts > 1
            fitting += parts > 1 and size <= dataset.meta.seq_len + 1
            size = parts = 0
    return cut, fitting


def needless_cuts(dataset: PackedDataset) -> int:
    """Of a best-fit dataset: pieces that neither end a document nor fill a sequence. A document
    longer than a sequence is cut into full ones and a rest, so only others leave such pieces."""
    length = dataset.meta.seq_len + 1
    return sum(not ended and tokens < length for tokens, ended in pieces(dataset))


def main(arguments: list[str]) -> int:
    """Print the tables; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.packing")
    parser.add_argument("--corpora", type=Path, default=OUT, help="where they are, or go")
    place = parser.parse_args(arguments).corpora
    tokenizer = load_tokenizer(neox_tokenizer(place))
    console = Console(highlight=False, markup=False, width=120)
    fills = Table("corpus", "sequence", "packing", "filled", "documents", "cut", "cut that fit")
    missed = 0
    for name, seq_len in itertools.product(CORPORA, (1024, 8192)):
        packings: tuple[Packing, ...] = ("best_fit", "concat")
        for packing in packings:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                console.print(f"{name}, {seq_len}, {packing} ...", style="dim")
                meta = prepare(
                    [corpus(name, place)], tokenizer.file, out, seq_len, packing,
                    validation_fraction=0,
                )["train"]  # fmt: skip
                dataset = PackedDataset(out / "train")
                filled = meta.tokens / (meta.tokens + meta.padding)
                if packing == "concat":
                    fitting = cut_documents(dataset)[1]
                else:
                    fitting = needless_cuts(dataset)
                    missed += filled < FILL or fitting > 0
            fills.add_row(
                name, f"{seq_len:,}", packing, f"{filled:.3%}", f"{meta.documents:,}",
                f"{meta.cut_documents:,}", f"{fitting:,}",
            )  # fmt: skip
    console.print(fills)
    found = speeds(place)
    rates = Table("corpus", "tokenizer alone, MB/s", "prepare, MB/s", "ratio")
    for name, (alone, whole) in found.items():
        rates.add_row(name, f"{alone:.2f}", f"{whole:.2f}", f"{whole / alone:.0%}")
        missed += whole / alone < SPEED
    console.print(rates)
    console.print("met" if not missed else f"MISSED {missed}")
    return 1 if missed else 0


def speeds(place: Path) -> dict[str, tuple[float, float]]:
    """MB/s of the tokenizer alone and of prepare in one process, on the same documents."""
    tokenizer = load_tokenizer(neox_tokenizer(place))
    found = {}
    for name in CORPORA:
        texts = [json.loads(line)["text"] for line in corpus(name, place).open()]
        size = sum(len(text.encode()) for text in texts) / 1e6
        alone, whole = [], []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            for at in range(0, len(texts), 64):
                tokenizer.encode_batch(texts[at : at + 64])
            alone.append(size / (time.perf_counter() - begin))
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                prepare(
                    [corpus(name, place)], tokenizer.file, Path(folder) / "out", 8192,
                    validation_fraction=0, workers=1,
                )  # fmt: skip
                whole.append(size / (time.perf_counter() - begin))
        found[name] = (statistics.median(alone), statistics.median(whole))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
