"""Text to shards: OUT/train and OUT/validation, each shards with index.json and meta.json.

    inputs → units of fixed size → (documents → split → tokens → packed samples → shards) each
           → one folder of shards a split

A document's split depends on the seed and its own name alone, a unit's shards on its documents
alone: the same input gives the same bytes whoever does which unit, in however many processes and
jobs. Everything is written to OUT.tmp and renamed at the end, so OUT exists whole or not at all.
A unit's name says what it is made of and how; those that an earlier run had finished are not done
again.
"""

import ctypes
import hashlib
import json
import logging
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.claim import Workplace, claim, is_finished, refuse_existing, tidy
from data_pipeline.corpus import Piece, units
from data_pipeline.corpus_checks import check_corpus
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.merge import (
    EmptySplitError,
    Totals,
    check_all_done,
    describe_split,
    index_of,
    move_shards,
)
from data_pipeline.meta import FORMAT_VERSION, META, DatasetMeta, Format, parse_meta
from data_pipeline.packing import Packing
from data_pipeline.reading import TextField, check_text_field, empty_corpus
from data_pipeline.remote import is_remote
from data_pipeline.remote_units import RemoteUnits
from data_pipeline.round_trip import MAX_LOST
from data_pipeline.shard_index import ShardEntry
from data_pipeline.tokenizer import TextTokenizer, load_tokenizer, read_tokenizer
from data_pipeline.unit import Compression, Done, Options, load_counts, load_labels, write_unit
from untrusted.errors import transferable
from untrusted.files import read_regular, write_durably
from untrusted.records import MAX_BYTES

SHARD_BYTES = 1 << 26
UNIT_BYTES = 1 << 26
POLL_SECONDS = 0.2

log = logging.getLogger("transxssm")


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is."""

    bytes_before: int
    """Done by an earlier start."""
    bytes_done: int
    """Those included."""
    bytes_total: int
    documents: int
    tokens: int
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        return (self.bytes_done - self.bytes_before) / 1e6 / max(self.seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def prepare(
    inputs: Sequence[Path | str],
    tokenizer_path: Path,
    out: Path | str,
    seq_len: int,
    packing: Packing = "best_fit",
    validation_fraction: float = 0.02,
    text_field: TextField = "text",
    seed: int = 1234,
    progress: Callable[[Progress], None] | None = None,
    *,
    document_separator: str = "",
    strict: bool = False,
    max_lost: float = MAX_LOST,
    tell: Callable[[str], None] = log.info,
    format: Format = "mds",
    compression: Compression = "none",
    end_of_text: str | None = None,
    workers: int = 0,
    share: tuple[int, int] = (1, 1),
    merge: bool = True,
    unit_bytes: int = UNIT_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, DatasetMeta]:
    """Tokenise, pack and write the corpus `inputs` to a folder or URL; returns each split's meta.

    text_field, document_separator, strict: how inputs become documents [see documents in
    reading.py]. max_lost: share of the characters of a sample of the corpus that the tokenizer may
    lose. end_of_text: the tokenizer's token that ends every document [see load_tokenizer]. workers:
    processes (0: one a core). share (i, n): do every n-th unit from the i-th on, of jobs
    that work on one OUT together; merge: put the units together, once all are there. `progress` is
    called about once a megabyte of text, `tell` with sentences about the corpus.

    Raises DataError for bad input, a tokenizer that loses text, an `out` that holds anything or is
    being written to, a split without documents and a full disk; `out` then does not exist, units
    that are done stay.
    """
    if seq_len < 1 or not 0 <= validation_fraction < 1:
        raise DataError(
            f"seq_len={seq_len}, validation_fraction={validation_fraction}: seq_len must be at "
            "least 1 and validation_fraction lie in [0, 1)."
        )
    if not 1 <= share[0] <= share[1]:
        raise DataError(f"share {share[0]}/{share[1]}: write i/n with 1 ≤ i ≤ n.")
    if not 0 <= max_lost <= 1:
        raise DataError(f"max_lost={max_lost}: a share of the characters, from 0 to 1.")
    check_text_field(text_field, inputs)
    if not isinstance(text_field, str):
        text_field = text_field[0] if len(text_field) == 1 else tuple(text_field)
    options = Options(
        seq_len, packing, validation_fraction, text_field, seed, shard_bytes, format, compression,
        document_separator, strict,
    )  # fmt: skip
    tokenizer = load_tokenizer(tokenizer_path, end_of_text)
    plan = _plan(inputs, tokenizer, options, unit_bytes)
    mine = list(plan)[share[0] - 1 :: share[1]]
    if is_remote(str(out)):
        remote = RemoteUnits(str(out))
        remote.refuse_finished()
        check_corpus(plan, tokenizer, options, max_lost, tell)
        _work_remotely(remote, plan, mine, tokenizer, options, workers, progress)
        return _merge_remotely(remote, list(plan), tokenizer, options) if merge else {}
    out = _resolved(out)
    work = hashlib.sha256("".join(plan).encode()).hexdigest()
    if is_finished(out, work):
        tidy(out)
        return _metas(out, options)
    refuse_existing(out)
    check_corpus(plan, tokenizer, options, max_lost, tell)
    with claim(out, work, plan.keys(), alone=merge) as place:
        try:
            refuse_existing(out)  # another start may have ended meanwhile
            if not place.merged:
                done = place.done(mine)
                left = [key for key in mine if key not in done]
                _work(
                    UnitWork(place.units), plan, mine, left, tokenizer, options, workers, progress
                )
            if not merge:
                return {}
            if not place.merged:
                _merge(place, list(plan), tokenizer, options)
            place.finish(out)
        except (DataError, OSError) as error:
            raise _explained(error, place, plan.keys()) from error
    return _metas(out, options)


def _plan(
    inputs: Sequence[Path | str], tokenizer: TextTokenizer, options: Options, unit_bytes: int
) -> dict[str, list[Piece]]:
    """All units in order, by a key each: equal if and only if the same text becomes the same
    shards."""
    how = [options.identity(), tokenizer.hash, tokenizer.eod_id, FORMAT_VERSION]
    plan = {}
    for unit in units(inputs, unit_bytes):
        what = [(p.name, p.start, p.end, p.num_bytes, p.content) for p in unit]
        plan[hashlib.sha256(json.dumps([what, how]).encode()).hexdigest()[:32]] = unit
    if not plan:
        raise empty_corpus(inputs)
    return plan


def _resolved(out: Path | str) -> Path:
    """Without links, so that OUT.tmp lies beside the folder it will be.

    Raises DataError for the working folder, which would be another one afterwards.
    """
    try:
        resolved, here = Path(out).resolve(), Path.cwd()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{out}: cannot be followed to a folder ({error}).") from error
    if resolved == here:
        raise DataError(f"--out {out} is the working folder; name a new folder in it.")
    return resolved


def _metas(out: Path, options: Options) -> dict[str, DatasetMeta]:
    files = {split: out / split / META for split in options.splits}
    return {
        split: parse_meta(read_regular(file, MAX_BYTES), str(file)) for split, file in files.items()
    }


def _explained(error: DataError | OSError, place: Workplace, keys: Collection[str]) -> DataError:
    """With what becomes of OUT.tmp: it goes if nothing in it is worth keeping."""
    kept = place.merged or bool(place.done(keys))
    if place.locked and (not kept or isinstance(error, EmptySplitError)):
        place.remove()
    if isinstance(error, EmptySplitError):
        return error
    text = str(error)
    if isinstance(error, OSError):
        text = (
            f"{place.folder}: cannot be written ({error.strerror}). Free space or mend permissions "
            "and run again."
        )
    if kept:
        text += f" What is done stays in {place.folder}; the same command goes on from there."
    return DataError(text)


# -- doing units ----------------------------------------------------------------------------------

_tokenizer: TextTokenizer
_reports: Any


def _start_worker(
    parent: int, tokenizer_file: Path, end_of_text: str, threads: int, reports: Any
) -> None:
    """Of a worker process: it ends with its parent, and tokenises with its share of the cores."""
    global _tokenizer, _reports
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # which ended before that
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    _tokenizer, _reports = load_tokenizer(tokenizer_file, end_of_text), reports


@dataclass(frozen=True)
class UnitWork:
    """Where units are written, and brought to if they do not stay there."""

    folder: Path
    remote: RemoteUnits | None = None

    def do(
        self,
        key: str,
        unit: list[Piece],
        tokenizer: TextTokenizer,
        options: Options,
        report: Callable[[Done], None],
    ) -> None:
        """Make one unit, whole or not at all."""
        folder = self.folder / key
        write_unit(folder, unit, tokenizer, options, report)
        if self.remote is not None:
            self.remote.put(key, folder, options.splits, tokenizer.vocab_size)
            shutil.rmtree(folder)


def _do_unit(work: UnitWork, key: str, unit: list[Piece], options: Options) -> None:
    try:
        work.do(key, unit, _tokenizer, options, _reports.put)
    except Exception as error:
        if (known := transferable(error)) is error:
            raise
        raise known from error


def _work(
    work: UnitWork,
    plan: dict[str, list[Piece]],
    mine: list[str],
    left: list[str],
    tokenizer: TextTokenizer,
    options: Options,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Do the units `left` of `mine`."""
    begin = time.monotonic()
    total = sum(piece.num_bytes for key in mine for piece in plan[key])
    done = total - sum(piece.num_bytes for key in left for piece in plan[key])
    sums = np.array([done, 0, 0])

    def tell(change: Done) -> None:
        sums[:] += (change.num_bytes, change.documents, change.tokens)
        if progress is not None:
            num_bytes, count, tokens = sums.tolist()
            seconds = time.monotonic() - begin
            progress(Progress(done, num_bytes, total, count, tokens, seconds))

    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    processes = min(workers or cores or 1, len(left))
    if processes <= 1:
        for key in left:
            work.do(key, plan[key], tokenizer, options, tell)
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        reports = manager.Queue()
        threads = max(1, (cores or 1) // processes)
        with ProcessPoolExecutor(
            processes,
            context,
            _start_worker,
            (os.getpid(), tokenizer.file, tokenizer.end_of_text, threads, reports),
        ) as pool:
            pending: set[Future[None]] = {
                pool.submit(_do_unit, work, key, plan[key], options) for key in left
            }
            try:
                while pending:
                    finished, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                    _drain(reports, tell)
                    for future in finished:
                        future.result()
            except BrokenProcessPool as error:
                raise DataError(
                    "A worker process was killed (out of memory?). Run again with fewer --workers."
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _drain(reports: Any, tell: Callable[[Done], None]) -> None:
    while True:
        try:
            tell(reports.get_nowait())
        except queue.Empty:
            return


# -- putting units together -----------------------------------------------------------------------


def _merge(place: Workplace, keys: list[str], tokenizer: TextTokenizer, options: Options) -> None:
    """All units' shards as one folder a split. May be cut off at any point and repeated."""
    check_all_done(keys, place.done(keys))
    totals = Totals(options.splits, tokenizer.vocab_size)
    for key in keys:
        unit = place.units / key
        totals.add(load_counts(unit, options.splits), load_labels(unit, totals.labels.shape))
    totals.check()
    for split in options.splits:
        index = move_shards([place.units / key / split for key in keys], place.folder / split)
        meta = describe_split(totals, split, index, tokenizer, options)
        write_durably(place.folder / split / META, meta.encode())
    write_durably(place.folder / "tokenizer.json", read_tokenizer(tokenizer.file))
    place.set_merged()


# -- at a URL -------------------------------------------------------------------------------------


def _work_remotely(
    remote: RemoteUnits,
    plan: dict[str, list[Piece]],
    mine: list[str],
    tokenizer: TextTokenizer,
    options: Options,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Do those of `mine` that are not there, in a temporary folder from which each is uploaded."""
    done = remote.done(mine)
    with tempfile.TemporaryDirectory(prefix="transxssm-prepare.") as folder:
        left = [key for key in mine if key not in done]
        work = UnitWork(Path(folder), remote)
        _work(work, plan, mine, left, tokenizer, options, workers, progress)


def _merge_remotely(
    remote: RemoteUnits, keys: list[str], tokenizer: TextTokenizer, options: Options
) -> dict[str, DatasetMeta]:
    """Indexes and descriptions, uploaded last: what has no meta.json is no dataset."""
    check_all_done(keys, remote.done(keys))
    totals = Totals(options.splits, tokenizer.vocab_size)
    shards: dict[str, list[ShardEntry]] = {split: [] for split in options.splits}
    for part in remote.parts(keys, options.splits, tokenizer.vocab_size):
        totals.add(part.counts, part.labels)
        for split in options.splits:
            shards[split] += part.shards[split]
    totals.check()
    metas = {}
    with tempfile.TemporaryDirectory(prefix="transxssm-prepare.") as name:
        folder = Path(name)
        for split in options.splits:
            index = index_of(shards[split])
            meta = describe_split(totals, split, index, tokenizer, options)
            (folder / split).mkdir()
            (folder / split / INDEX).write_bytes(index)
            (folder / split / META).write_text(meta)
            metas[split] = parse_meta(meta.encode(), f"{remote.url}/{split}/{META}")
        (folder / "tokenizer.json").write_bytes(read_tokenizer(tokenizer.file))
        remote.refuse_finished()  # what another start has finished meanwhile
        remote.finish(folder, options.splits)
    return metas
