"""The demo's corpus: real text that every machine with Python has.

The standard library's sources of the running Python, and the language documentation that
`help("TOPIC")` prints (pydoc_data.topics), each file and topic a document.
"""

import importlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError

# Tests are data more than prose, codec tables hardly repeat a word, and pydoc_data is read below.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
    | {"pydoc_data"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize")  # differ from machine to machine
MIN_BYTES = 1 << 20


@dataclass(frozen=True)
class DemoCorpus:
    """What `demo_corpus` wrote."""

    folder: Path
    files: int
    num_bytes: int


def demo_corpus(out_dir: Path) -> DemoCorpus:
    """Write the demo's corpus below `out_dir`, which must not exist or be empty.

    Raises DataError when `out_dir` holds anything, or this Python comes without sources.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"{out_dir} exists and is not an empty folder; remove it or name another.")
    temporary = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(0o755, parents=True)  # this user's own, or nothing is written
    except OSError as error:
        raise DataError(f"{temporary}: cannot be made ({error.strerror}); remove it.") from error
    files = num_bytes = 0
    try:
        for name, data in _sources():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            files, num_bytes = files + 1, num_bytes + len(data)
        if num_bytes < MIN_BYTES:
            raise DataError(
                f"{sysconfig.get_path('stdlib')}: holds only {num_bytes} bytes of Python sources; "
                "this Python was installed without its standard library's sources. Prepare a "
                "corpus of your own instead, or use a full Python."
            )
        os.rename(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return DemoCorpus(out_dir, files, num_bytes)


def _sources() -> Iterator[tuple[str, bytes]]:
    """(relative file name, UTF-8 bytes) of every document, in a fixed order."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.intersection(name.parts) or name.name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            data = path.read_bytes()
            data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few sources are in other encodings; a dangling link is not ours to mend
        if data.strip():
            yield f"stdlib/{name.as_posix()}", data
    try:
        # Imported, not parsed: how the file spells its strings changes from version to version.
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # Debian's minimal Python
        return
    for topic in sorted(topics):
        yield f"topics/{topic.replace('/', '_')}.txt", topics[topic].encode()
