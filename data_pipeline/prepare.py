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
from data_pipeline.meta import FORMAT_VERSION, META, DatasetMeta, Format, fingerprint, read_meta
from data_pipeline.packing import Packing
from data_pipeline.reading import empty_corpus
from data_pipeline.tokenizer import TextTokenizer, load_tokenizer
from data_pipeline.unit import COUNTS, LABELS, Done, Options, write_unit

SHARD_BYTES = 1 << 26
UNIT_BYTES = 1 << 26
STATE = ".transxssm-prepare"  # in OUT.tmp: which work is done there, and whether it is merged
POLL_SECONDS = 0.2


class WorkerKilledError(DataError):
    """A process that did a unit is gone; what others had done stays."""


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is."""

    bytes_done: int
    bytes_total: int
    documents: int
    tokens: int
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes_done / 1e6 / max(self.seconds, 1e-9)


def prepare(
    inputs: Sequence[Path | str],
    tokenizer_path: Path,
    out: Path,
    seq_len: int,
    packing: Packing = "best_fit",
    validation_fraction: float = 0.02,
    text_field: str = "text",
    seed: int = 1234,
    progress: Callable[[Progress], None] | None = None,
    *,
    format: Format = "mds",
    workers: int = 0,
    share: tuple[int, int] = (1, 1),
    merge: bool = True,
    unit_bytes: int = UNIT_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, DatasetMeta]:
    """Tokenise, pack and write the corpus `inputs`; returns each split's meta.

    workers: processes (0: one a core). share (i, n): do every n-th unit from the i-th on, of jobs
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
    options = Options(seq_len, packing, validation_fraction, text_field, seed, shard_bytes, format)
    tokenizer = load_tokenizer(tokenizer_path)
    plan = list(units(inputs, unit_bytes))
    if not plan:
        raise empty_corpus(inputs)
    temporary, work = out.with_name(out.name + ".tmp"), _identity(plan, tokenizer, options)
    if _state(out) == f"{work} merged":  # killed at its very end
        return _finish(temporary, out, options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder; remove it or name another.")
    resumed = _claim(temporary, work)
    try:
        if _state(temporary) == work:
            mine = range(share[0] - 1, len(plan), share[1])
            _work(temporary, plan, mine, tokenizer, options, workers, progress)
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
        left = "nothing is left there" if fresh else f"what is done stays in {temporary}"
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); {left}. Free space or mend permissions "
            "and run again."
        ) from error


# -- the folder of unfinished work ----------------------------------------------------------------


def _identity(plan: list[list[Piece]], tokenizer: TextTokenizer, options: Options) -> str:
    """Of the work: equal if and only if the same units become the same shards."""
    pieces = [[(p.name, p.start, p.end, p.num_bytes) for p in unit] for unit in plan]
    work = json.dumps([pieces, asdict(options), tokenizer.hash, FORMAT_VERSION])
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


def _start_worker(parent: int, tokenizer_file: Path, threads: int, reports: Any) -> None:
    """Of a worker process: it ends with its parent, and tokenises with its share of the cores."""
    global _tokenizer, _reports
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # which ended before that
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    _tokenizer, _reports = load_tokenizer(tokenizer_file), reports


def _do_unit(folder: Path, unit: list[Piece], options: Options) -> None:
    write_unit(folder, unit, _tokenizer, options, _reports.put)


def _work(
    temporary: Path,
    plan: list[list[Piece]],
    mine: range,
    tokenizer: TextTokenizer,
    options: Options,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Do those of `mine` that are not done."""
    begin = time.monotonic()
    total = sum(piece.num_bytes for number in mine for piece in plan[number])
    left = [number for number in mine if not _unit_folder(temporary, number).exists()]
    done = total - sum(piece.num_bytes for number in left for piece in plan[number])
    sums = np.array([done, 0, 0])

    def tell(change: Done) -> None:
        sums[:] += (change.num_bytes, change.documents, change.tokens)
        if progress is not None:
            num_bytes, count, tokens = sums.tolist()
            progress(Progress(num_bytes, total, count, tokens, time.monotonic() - begin))

    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    processes = min(workers or cores or 1, len(left))
    if processes <= 1:
        for number in left:
            write_unit(_unit_folder(temporary, number), plan[number], tokenizer, options, tell)
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        reports = manager.Queue()
        threads = max(1, (cores or 1) // processes)
        with ProcessPoolExecutor(
            processes, context, _start_worker, (os.getpid(), tokenizer.file, threads, reports)
        ) as pool:
            pending: set[Future[None]] = {
                pool.submit(_do_unit, _unit_folder(temporary, number), plan[number], options)
                for number in left
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
    if missing := [folder.name for folder in folders if not folder.exists()]:
        raise DataError(
            f"{len(missing)} of {num_units} units are not done (the first: {missing[0]}); run "
            "`prepare` with the same options for every share before it is merged"
        )
    counts = [json.loads((folder / COUNTS).read_text()) for folder in folders]
    labels = sum(np.load(folder / LABELS) for folder in folders)
    for number, split in enumerate(options.splits):
        summed = {
            field: sum(unit[split][field] for unit in counts)
            for field in ("documents", "cut_documents", "samples", "tokens", "padding")
        }
        if not summed["samples"]:
            raise DataError(
                f"No document fell into the {split} split. The corpus has too few documents for "
                "this validation fraction: give more (a line of a .jsonl file is one), or another "
                "--validation-fraction (0: no validation split)."
            )
        index = _move_shards([folder / split for folder in folders], temporary / split)
        loss_tokens = int(labels[number].sum())
        p = labels[number][labels[number] > 0] / max(1, loss_tokens)
        meta = DatasetMeta(
            format_version=FORMAT_VERSION,
            format=options.format,
            seq_len=options.seq_len,
            packing=options.packing,
            seed=options.seed,
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            pad_id=tokenizer.pad_id,
            **summed,
            loss_tokens=loss_tokens,
            unigram_entropy=float(-(p * np.log(p)).sum()),
            fingerprint=fingerprint(index, tokenizer.hash),
        )
        (temporary / split / META).write_text(json.dumps(meta.model_dump(), indent=2) + "\n")
    shutil.copyfile(tokenizer.file, temporary / "tokenizer.json")


def _finish(temporary: Path, out: Path, options: Options) -> dict[str, DatasetMeta]:
    """OUT.tmp, merged, becomes OUT; each split's meta. May be cut off at any point and repeated."""
    if temporary.exists():
        shutil.rmtree(temporary / "units", ignore_errors=True)
        for stray in temporary.glob(f"{STATE}.*"):  # of a process killed while it wrote its state
            stray.unlink()
        os.rename(temporary, out)  # replaces an empty folder
    (out / STATE).unlink()
    return {split: read_meta(out / split) for split in options.splits}


def _move_shards(sources: list[Path], target: Path) -> bytes:
    """Number the units' shards through and move them to `target`; its index.json."""
    target.mkdir(exist_ok=True)
    shards: list[dict[str, Any]] = []
    for source in sources:
        if not (source / INDEX).exists():  # no document of this unit fell into this split
            continue
        for shard in json.loads((source / INDEX).read_bytes())["shards"]:
            for file in filter(None, (shard["raw_data"], shard.get("offsets"))):
                old = source / file["basename"]
                suffixes = "".join(old.suffixes[1:])
                new = target / f"shard.{len(shards):06d}{suffixes}"
                if old.exists():
                    os.rename(old, new)
                elif not new.exists():
                    raise DataError(
                        f"{old}: is missing; remove {source.parents[2]} and prepare anew."
                    )
                file["basename"] = new.name
            shards.append(shard)
    index = json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()
    (target / INDEX).write_bytes(index)
    return index
