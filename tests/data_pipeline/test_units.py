"""Units: whoever does the work, and however often it is killed, the bytes are the same."""

import gzip
import io
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import prepare as preparing
from data_pipeline.arrays import read_labels
from data_pipeline.corpus import units
from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.reading import documents, unit_documents
from tests.data_pipeline.conftest import SEQ_LEN
from tests.data_pipeline.test_prepare import contents

SMALL: dict[str, Any] = {"unit_bytes": 3000, "shard_bytes": 2048, "validation_fraction": 0.2}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(["a", "bé", "🙂" * 9, "", " ", "x" * 40]), max_size=40),
    unit_bytes=st.integers(1, 200),
    newline=st.booleans(),
)
def test_lines_are_read_once_however_files_are_cut(
    lines: list[str], unit_bytes: int, newline: bool, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    text = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    file.write_text(text + "\n" * newline)
    found = [d for unit in units([file], unit_bytes) for d in unit_documents(unit, "text")]
    assert [d.text for d in found] == [line for line in lines if line.strip()]
    assert len({d.id for d in found}) == len(found)


@pytest.mark.parametrize("small", [False, True], ids=["", "small blocks"])
def test_compressed_files_and_parquet_hold_the_same_documents(
    small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    if small:
        monkeypatch.setattr("data_pipeline.compressed.INPUT_BYTES", 7)
        monkeypatch.setattr("data_pipeline.compressed.BUFFER_BYTES", 16)
        monkeypatch.setattr("data_pipeline.parquet.BATCH_ROWS", 3)
        monkeypatch.setattr("data_pipeline.parquet.HEADER_BYTES", 8)
    texts = [f"document {i} " + "wörd " * (i % 7) for i in range(50)] + ["", "end"]
    plain = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(plain)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    frames = [zstandard.compress(part) for part in (plain[:700], plain[700:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"text": [*texts, None], "n": range(len(texts) + 1)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"ein Text"))
    table = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "f.parquet.gz").write_bytes(gzip.compress(table))
    (tmp_path / "g.parquet.zst").write_bytes(zstandard.compress(table))
    expected = [text for text in texts if text]
    for name in (
        "a.jsonl",
        "b.jsonl.gz",
        "c.jsonl.zst",
        "d.parquet",
        "f.parquet.gz",
        "g.parquet.zst",
    ):
        assert [d.text for d in documents([tmp_path / name])] == expected, name
    cut = [d for unit in units([tmp_path / "d.parquet"], 300) for d in unit_documents(unit, "text")]
    assert [d.text for d in cut] == expected
    assert len({d.id for d in cut}) == len(expected)
    assert len(list(documents([tmp_path]))) == 6 * len(expected) + 1


LINE = zstandard.compress(b'{"text": "x"}\n')


def flushed(text: bytes) -> bytes:
    """A frame that is cut off behind all of `text`."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(text) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20], "cannot be read"),
        ("a.parquet", b"PAR1 and nothing", "not a Parquet file"),
        ("a.jsonl.zst", b"no zstd", "cannot be read"),
        ("a.txt.zst", zstandard.compress(b"text " * 1000)[:-3], "ends within a frame"),
        ("a.jsonl.zst", flushed(b'{"text": "x"}\n' * 10), "ends within a frame"),
        ("a.jsonl.zst", LINE + LINE[:-1], "ends within a frame"),
        ("a.txt.zst", b"", "it is empty"),
        ("a.txt.gz", b"", "it is empty"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        list(documents([tmp_path]))


def test_rows_without_text_cost_nothing_each(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    values = pyarrow.array(["a"] + [None] * 10**7 + ["b"], pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "nulls.parquet")
    begin = time.process_time()
    assert [d.text for d in documents([tmp_path / "nulls.parquet"])] == ["a", "b"]
    assert time.process_time() - begin < 5


def test_parquet_without_the_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    for field, message in (
        ("text", r"no column 'text' \(columns: body, n\)"),
        ("n", "not a string"),
    ):
        with pytest.raises(DataError, match=message):
            list(documents([tmp_path], field))


@pytest.fixture(scope="module")
def expected(corpus: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("expected") / "o"
    metas = prepare([corpus], tokenizer_file, out, SEQ_LEN, workers=1, **SMALL)
    assert len(list(units([corpus], SMALL["unit_bytes"]))) > 8
    assert metas["train"].documents + metas["validation"].documents == 120
    return contents(out)


def test_workers_do_not_change_a_byte(
    corpus: Path, tokenizer_file: Path, tmp_path: Path, expected: Any
) -> None:
    prepare([corpus], tokenizer_file, tmp_path / "o", SEQ_LEN, workers=2, **SMALL)
    assert contents(tmp_path / "o") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_job_arrays_do_not_change_a_byte(
    corpus: Path, tokenizer_file: Path, tmp_path: Path, expected: Any
) -> None:
    arguments = ([corpus], tokenizer_file, tmp_path / "o", SEQ_LEN)
    for share in (4, 2, 5, 1):
        assert prepare(*arguments, workers=1, share=(share, 5), merge=False, **SMALL) == {}
    with pytest.raises(DataError, match="not done"):
        prepare(*arguments, workers=1, share=(1, 5), merge=True, **SMALL)
    prepare(*arguments, workers=1, share=(3, 5), merge=True, **SMALL)
    assert contents(tmp_path / "o") == expected


def test_other_work_starts_anew(corpus: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    arguments = ([corpus], tokenizer_file, tmp_path / "o")
    prepare(*arguments, 64, workers=1, share=(1, 2), merge=False, **SMALL)
    prepare(*arguments, SEQ_LEN, workers=1, share=(1, 2), merge=False, **SMALL)
    with pytest.raises(DataError, match="not done"):
        prepare(*arguments, 64, workers=1, share=(2, 2), merge=True, **SMALL)


def test_a_killed_worker_loses_nothing_that_was_done(
    corpus: Path, tokenizer_file: Path, tmp_path: Path, expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What `prepare` does when its pool of workers breaks, with one in the killed one's place."""
    work, done = preparing._work, []

    def some(place: Any, plan: Any, mine: range, left: list[str], *rest: Any) -> None:
        work(place, plan, mine, left[:5], *rest)
        done.extend(place.folder.iterdir())
        raise DataError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_work", some)
        with pytest.raises(DataError, match="killed"):
            run(corpus, tokenizer_file, tmp_path / "o", 1)
    assert len(done) == 5
    assert all(folder.exists() for folder in done)
    run(corpus, tokenizer_file, tmp_path / "o", 1)
    assert contents(tmp_path / "o") == expected


def run(corpus: Path, tokenizer_file: Path, out: Path, workers: int) -> None:
    prepare([corpus], tokenizer_file, out, SEQ_LEN, workers=workers, **SMALL)


def kill_when_unlinked(corpus: Path, tokenizer_file: Path, out: Path, countdown: int) -> None:
    """Die at the n-th rename: units, shards, states and the end are all renames."""
    rename, replace = os.rename, os.replace

    def fatal(*paths: Any) -> None:
        nonlocal countdown
        countdown -= 1
        if not countdown:
            os.kill(os.getpid(), signal.SIGKILL)
        (rename if paths else replace)(*paths)

    os.rename = os.replace = fatal  # type: ignore[assignment]
    run(corpus, tokenizer_file, out, 1)


@pytest.mark.parametrize("first", [1, 7, 30])
def test_killed_at_any_rename_and_restarted_gives_the_same_bytes(
    first: int, corpus: Path, tokenizer_file: Path, tmp_path: Path, expected: Any
) -> None:
    context, deaths = multiprocessing.get_context("fork"), 0
    for countdown in range(first, 1000, 11):
        arguments = (corpus, tokenizer_file, tmp_path / "o", countdown)
        process = context.Process(target=kill_when_unlinked, args=arguments)
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
    assert contents(tmp_path / "o") == expected
    assert deaths


def test_killed_at_random_with_workers(
    corpus: Path, tokenizer_file: Path, tmp_path: Path, expected: Any
) -> None:
    chance, context = random.Random(3), multiprocessing.get_context("spawn")
    for _ in range(3):
        arguments = (corpus, tokenizer_file, tmp_path / "o", 2)
        process = context.Process(target=run, args=arguments)
        process.start()
        time.sleep(chance.uniform(1.5, 3.5))
        process.kill()
        process.join()
    if not (tmp_path / "o").exists():
        run(corpus, tokenizer_file, tmp_path / "o", 2)
    assert contents(tmp_path / "o") == expected


def test_labels_are_read_from_regular_files_alone(tmp_path: Path) -> None:
    (tmp_path / "labels.npz").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"labels\.npz is damaged \(.*link.*remove it"):
        read_labels(tmp_path / "labels.npz", str(tmp_path / "labels.npz"), (2, 3))


@pytest.mark.parametrize("method", ["stored", "deflated", "bzip2", "lzma"])
def test_damaged_labels_are_one_sentence(method: str, tmp_path: Path) -> None:
    import zipfile

    path, labels = tmp_path / "labels.npz", np.arange(6_000, dtype=np.int64).reshape(2, 3_000)
    content = io.BytesIO()
    np.save(content, labels)
    with zipfile.ZipFile(path, "w", getattr(zipfile, f"ZIP_{method.upper()}")) as archive:
        archive.writestr("labels.npy", content.getvalue())
    assert (read_labels(path, "it", (2, 3_000)) == labels).all()
    sound, choice = path.read_bytes(), random.Random(0)
    refused = []
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(choice.randrange(1, 4)):
            damaged[choice.randrange(len(damaged))] = choice.randrange(256)
        path.write_bytes(damaged[: choice.choice([len(damaged), choice.randrange(len(damaged))])])
        try:
            read_labels(path, "it", (2, 3_000))
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(message.startswith("it is damaged (") for message in refused)
