"""Text to shards: OUT/train and OUT/validation, each shards with index.json and meta.json.

    inputs → units of fixed size → (documents → split → tokens → packed samples → shards) each
           → one folder of shards a split

A document's split depends on the seed and its own name alone, a unit's shards on its documents
alone: the same input gives the same bytes whoever does which unit, in however many processes and
jobs. Everything is written to OUT.tmp and renamed at the end, so OUT exists whole or not at all;
units that a killed run had finished are not done again.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.corpus import Piece, units
from data_pipeline.errors import DataError
from data_pipeline.mds import INDEX
from data_pipeline.merge import check_all_done, describe_split, index_of, move_shards, sum_counts
from data_pipeline.meta import FORMAT_VERSION, META, DatasetMeta, Format, parse_meta
from data_pipeline.packing import Packing
from data_pipeline.reading import empty_corpus
from data_pipeline.remote import is_remote
from data_pipeline.remote_units import RemoteUnits
from data_pipeline.tokenizer import TextTokenizer, load_tokenizer
from data_pipeline.unit import COUNTS, LABELS, Compression, Done, Options, write_unit

SHARD_BYTES = 1 << 26
UNIT_BYTES = 1 << 26
STATE = ".transxssm-prepare"  # in OUT.tmp: which work is done there, and whether it is merged
POLL_SECONDS = 0.2


class WorkerKilledError(DataError):
    """A process that did a unit is gone; what others had done stays."""


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
    text_field: str = "text",
    seed: int = 1234,
    progress: Callable[[Progress], None] | None = None,
    *,
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

    end_of_text: the tokenizer's token that ends every document [see load_tokenizer]. workers:
    processes (0: one a core). share (i, n): do every n-th unit from the i-th on, of jobs
    that work on one OUT together; merge: put the units together, once all are there. `progress` is
    called about once a megabyte of text.

    Raises DataError for bad input, an `out` that holds anything, a split without documents and a
    full disk; `out` then does not exist.
    """
    if seq_len < 1 or not 0 <= validation_fraction < 1:
        raise DataError(
            f"seq_len={seq_len}, validation_fraction={validation_fraction}: seq_len must be at "
            "least 1 and validation_fraction lie in [0, 1)."
        )
    if not 1 <= share[0] <= share[1]:
        raise DataError(f"share {share[0]}/{share[1]}: write i/n with 1 ≤ i ≤ n.")
    options = Options(
        seq_len, packing, validation_fraction, text_field, seed, shard_bytes, format, compression
    )
    tokenizer = load_tokenizer(tokenizer_path, end_of_text)
    plan = list(units(inputs, unit_bytes))
    if not plan:
        raise empty_corpus(inputs)
    mine = range(share[0] - 1, len(plan), share[1])
    work = _identity(plan, tokenizer, options)
    if is_remote(str(out)):
        remote = RemoteUnits(str(out), work)
        _work_remotely(remote, plan, mine, tokenizer, options, workers, progress)
        return _merge_remotely(remote, len(plan), tokenizer, options) if merge else {}
    out = Path(out)
    temporary = out.with_name(out.name + ".tmp")
    if _state(out) == f"{work} merged":  # killed at its very end
        return _finish(temporary, out, options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder; remove it or name another.")
    resumed = _claim(temporary, work)
    try:
        if _state(temporary) == work:
            left = [n for n in mine if not _unit_folder(temporary, n).exists()]
            do = UnitWork(temporary, None)
            _work(do, plan, mine, left, tokenizer, options, workers, progress)
            if not merge:
                return {}
            _merge(temporary, len(plan), tokenizer, options)
            _set_state(temporary, f"{work} merged")
        return _finish(temporary, out, options)
    except WorkerKilledError:
        raise
    except (DataError, OSError) as error:
        fresh = share == (1, 1) and not resumed  # else others may be at work, or have been
        if fresh:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, DataError):
            raise
        state = "nothing is left there" if fresh else f"what is done stays in {temporary}"
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); {state}. Free space or mend permissions "
            "and run again."
        ) from error


# -- the folder of unfinished work ----------------------------------------------------------------


def _identity(plan: list[list[Piece]], tokenizer: TextTokenizer, options: Options) -> str:
    """Of the work: equal if and only if the same units become the same shards."""
    pieces = [[(p.name, p.start, p.end, p.num_bytes) for p in unit] for unit in plan]
    work = json.dumps([pieces, asdict(options), tokenizer.hash, tokenizer.eod_id, FORMAT_VERSION])
    return hashlib.sha256(work.encode()).hexdigest()


def _state(folder: Path) -> str | None:
    """Which work a folder is of, and whether it is merged; None where it says nothing."""
    try:
        return (folder / STATE).read_text()
    except OSError:
        return None


def _set_state(folder: Path, state: str) -> None:
    mine = folder / f"{STATE}.{os.getpid()}"
    mine.write_text(state)
    os.replace(mine, folder / STATE)


def _claim(temporary: Path, work: str) -> bool:
    """Make OUT.tmp, or go on with one of the same work; whether there was one."""
    try:
        state = _state(temporary)
        if state is None and temporary.exists() and any(map(_is_strange, temporary.iterdir())):
            raise DataError(f"{temporary} is in the way and not from `prepare`; move it elsewhere.")
        if state not in (None, work, f"{work} merged"):
            shutil.rmtree(temporary)  # left by a killed run over other text or with other options
        temporary.mkdir(parents=True, exist_ok=True)
        found = _state(temporary) is not None
        if not found:
            _set_state(temporary, work)
        return found
    except OSError as error:
        raise DataError(f"{temporary}: cannot be created ({error.strerror}).") from error


def _is_strange(path: Path) -> bool:
    return not path.name.startswith(STATE)


def _unit_folder(temporary: Path, number: int) -> Path:
    return temporary / "units" / f"{number:06d}"


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
    remote: RemoteUnits | None

    def do(
        self,
        number: int,
        unit: list[Piece],
        tokenizer: TextTokenizer,
        options: Options,
        report: Callable[[Done], None],
    ) -> None:
        """Make one unit, whole or not at all."""
        folder = _unit_folder(self.folder, number)
        write_unit(folder, unit, tokenizer, options, report)
        if self.remote is not None:
            self.remote.put(number, folder, options.splits)
            shutil.rmtree(folder)


def _do_unit(work: UnitWork, number: int, unit: list[Piece], options: Options) -> None:
    work.do(number, unit, _tokenizer, options, _reports.put)


def _work(
    work: UnitWork,
    plan: list[list[Piece]],
    mine: range,
    left: list[int],
    tokenizer: TextTokenizer,
    options: Options,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Do the units `left` of `mine`."""
    begin = time.monotonic()
    total = sum(piece.num_bytes for number in mine for piece in plan[number])
    done = total - sum(piece.num_bytes for number in left for piece in plan[number])
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
        for number in left:
            work.do(number, plan[number], tokenizer, options, tell)
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
                pool.submit(_do_unit, work, number, plan[number], options) for number in left
            }
            try:
                while pending:
                    finished, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                    _drain(reports, tell)
                    for future in finished:
                        future.result()
            except BrokenProcessPool as error:
                raise WorkerKilledError(
                    "a worker process was killed (out of memory?); run the same command again "
                    "with fewer --workers: it goes on with the units that are left"
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


def _merge(temporary: Path, num_units: int, tokenizer: TextTokenizer, options: Options) -> None:
    """All units' shards as one folder a split. May be cut off at any point and repeated."""
    folders = [_unit_folder(temporary, number) for number in range(num_units)]
    check_all_done([number for number in range(num_units) if not folders[number].exists()])
    counts = [json.loads((folder / COUNTS).read_text()) for folder in folders]
    labels = np.sum([np.load(folder / LABELS) for folder in folders], axis=0)
    for number, split in enumerate(options.splits):
        summed = sum_counts(counts, split)
        index = move_shards([folder / split for folder in folders], temporary / split)
        meta = describe_split(summed, labels[number], index, tokenizer, options)
        (temporary / split / META).write_text(meta)
    shutil.copyfile(tokenizer.file, temporary / "tokenizer.json")


def _finish(temporary: Path, out: Path, options: Options) -> dict[str, DatasetMeta]:
    """OUT.tmp, merged, becomes OUT; each split's meta. May be cut off at any point and repeated."""
    if temporary.exists():
        shutil.rmtree(temporary / "units", ignore_errors=True)
        for stray in temporary.glob(f"{STATE}.*"):  # of a process killed while it wrote its state
            stray.unlink()
        os.rename(temporary, out)  # replaces an empty folder
    (out / STATE).unlink()
    files = {split: out / split / META for split in options.splits}
    return {split: parse_meta(file.read_bytes(), str(file)) for split, file in files.items()}


# -- at a URL -------------------------------------------------------------------------------------


def _work_remotely(
    remote: RemoteUnits,
    plan: list[list[Piece]],
    mine: range,
    tokenizer: TextTokenizer,
    options: Options,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Do those of `mine` that are not there, in a temporary folder from which each is uploaded."""
    done = remote.done()
    with tempfile.TemporaryDirectory(prefix="transxssm-prepare.") as folder:
        do = UnitWork(Path(folder), remote)
        left = [number for number in mine if number not in done]
        _work(do, plan, mine, left, tokenizer, options, workers, progress)


def _merge_remotely(
    remote: RemoteUnits, num_units: int, tokenizer: TextTokenizer, options: Options
) -> dict[str, DatasetMeta]:
    """Indexes and descriptions, uploaded last: what has no meta.json is no dataset."""
    done = remote.done()
    check_all_done([number for number in range(num_units) if number not in done])
    with tempfile.TemporaryDirectory(prefix="transxssm-prepare.") as name:
        folder = Path(name)
        parts = remote.collect(num_units, folder)
        labels = np.sum([part.labels for part in parts], axis=0)
        metas = {}
        for number, split in enumerate(options.splits):
            summed = sum_counts([part.counts for part in parts], split)
            index = index_of([shard for part in parts for shard in part.shards[split]])
            meta = describe_split(summed, labels[number], index, tokenizer, options)
            (folder / split).mkdir()
            (folder / split / INDEX).write_bytes(index)
            (folder / split / META).write_text(meta)
            metas[split] = parse_meta(meta.encode(), f"{remote.url}/{split}/{META}")
        shutil.copyfile(tokenizer.file, folder / "tokenizer.json")
        remote.finish(folder, options.splits)
    return metas
