"""How fast data is read and opened, as ratios to the least that it could take.

    python -m benchmarks.data_reading [--quick]

- Reading 8 sequences of 4,096 tokens at random places against a memory-mapped numpy array of the
  same tokens: samples as they are stored, and batches with labels, mask, positions and borders,
  made where they are used or by threads that read ahead. What is read ahead does not lie in the
  cache any more, and threads hand it over, also numpy's: like is compared with like.
- The same against what the demo's model consumes, forward and backward, on this machine.
- Opening 100 million samples (an index of such a size on disk, no shards) in 8 processes at once:
  seconds, and memory of all of them together.

Every ratio is of medians over interleaved repeats. Exits with 1 when a bound is missed: samples,
and MDS batches made in place or by the one thread of the default, at 50 % of numpy's rate; every
way of reading at 100 times what the demo consumes; opening in 5 s and 1 GB.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.blend import Blend
from data_pipeline.collate import collate
from data_pipeline.dataset import PackedDataset
from data_pipeline.loader import BatchLoader, BatchSize
from data_pipeline.mds import INDEX, columns, open_writer
from data_pipeline.meta import FORMAT_VERSION, META, DatasetMeta, Format, fingerprint
from data_pipeline.packing import Sample
from data_pipeline.tar import TarShardWriter

BATCH, SEQ_LEN, SAMPLES, VOCAB_SIZE = 8, 4096, 2048, 50_000
PIECES = 4  # documents in a sample
MDS_BATCHES = "mds: batches"
NUMPY = "memory-mapped numpy: tokens, labels"
CONFIG = Path(__file__).parents[1] / "configs/demo.toml"
MANY, SHARD_SAMPLES, PROCESSES = 100_000_000, 8192, 8
BOUNDS = {"read": 0.5, "demo": 100.0, "seconds": 5.0, "bytes": 1e9}


def describe(folder: Path, format: Format, samples: int) -> None:
    """Write meta.json beside an index.json."""
    index = (folder / INDEX).read_bytes()
    meta = DatasetMeta(
        format_version=FORMAT_VERSION, format=format, seq_len=SEQ_LEN, packing="best_fit", seed=0,
        tokenizer_hash="", vocab_size=VOCAB_SIZE, eod_id=0, pad_id=0, samples=samples,
        documents=samples, cut_documents=0, tokens=samples * (SEQ_LEN + 1), padding=0,
        loss_tokens=samples * SEQ_LEN, unigram_entropy=0.0, fingerprint=fingerprint(index, ""),
    )  # fmt: skip
    (folder / META).write_text(meta.model_dump_json())


def write_all(folder: Path) -> None:
    """The same random tokens as MDS and WebDataset shards and as a plain array."""
    random = np.random.default_rng(0)
    plain = np.lib.format.open_memmap(folder / "plain.npy", "w+", np.uint16, (SAMPLES, SEQ_LEN + 1))
    mds = open_writer(str(folder / "mds"), "uint16", SEQ_LEN, 1 << 24)
    tar = TarShardWriter(folder / "webdataset", 1 << 24)
    for row in plain:
        row[:] = random.integers(0, VOCAB_SIZE, SEQ_LEN + 1)
        cuts = np.sort(random.choice(np.arange(1, SEQ_LEN), PIECES - 1, replace=False))
        lens = np.diff([0, *cuts, SEQ_LEN + 1]).astype(np.int32)
        for writer in (mds, tar):
            writer.write({"tokens": np.array(row), "doc_lens": lens, "num_pad": 0})
    plain.flush()
    mds.finish()
    tar.finish()
    describe(folder / "mds", "mds", SAMPLES)
    describe(folder / "webdataset", "webdataset", SAMPLES)


def readers(folder: Path) -> dict[str, Callable[[int], None]]:
    """Ways to read so many batches, the bare one first."""
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    random = np.random.default_rng(1)

    def bare_batch() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(plain[random.integers(0, SAMPLES, BATCH)].astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def bare(steps: int) -> None:
        for _ in range(steps):
            bare_batch()

    found: dict[str, Callable[[int], None]] = {NUMPY: bare}
    for workers in (1, 2):

        def bare_ahead(steps: int, workers: int = workers) -> None:
            pool = ThreadPoolExecutor(workers)
            waiting = deque(pool.submit(bare_batch) for _ in range(2 * workers))
            for _ in range(steps):
                waiting.popleft().result()
                waiting.append(pool.submit(bare_batch))
            pool.shutdown()

        found[ahead(NUMPY, workers)] = bare_ahead
    for format in ("mds", "webdataset"):
        blend = Blend([PackedDataset(folder / format)], seed=1)
        blend.make_ready(np.arange(SAMPLES))

        def samples(steps: int, blend: Blend = blend) -> None:
            for step in range(steps):
                blend.read(np.arange(step * BATCH, (step + 1) * BATCH))

        found[f"{format}: samples"] = samples
        for workers in (0, 1, 2):

            def batches(steps: int, blend: Blend = blend, workers: int = workers) -> None:
                loader = BatchLoader(
                    blend, [BatchSize(0, BATCH, BATCH)], data_parallel_rank=0,
                    data_parallel_size=1, num_workers=workers,
                )  # fmt: skip
                for _ in range(steps):
                    loader.next_step()
                loader.close()

            found[ahead(f"{format}: batches", workers)] = batches
    return found


def ahead(label: str, workers: int) -> str:
    """Of the same thing made by threads that read ahead."""
    return f"{label}, {workers} ahead" if workers else label


def rates(actions: dict[str, Callable[[int], None]], steps: int, repeats: int) -> dict[str, float]:
    """Tokens a second of each, medians of interleaved repeats."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            begin = time.perf_counter()
            action(steps)
            seconds[name].append(time.perf_counter() - begin)
    tokens = steps * BATCH * SEQ_LEN
    return {name: tokens / statistics.median(found) for name, found in seconds.items()}


def demo_rate() -> float:
    """Tokens a second of the demo's model on this machine, forward and backward."""
    from benchmarks.ranks import run_ranks

    return float(run_ranks(1, _demo_rate)[0])


def _demo_rate() -> float:
    from parallel.compat import prepare_host
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from pretrain.config import load_config
    from pretrain.stage import configured_stage

    config, device = load_config(CONFIG), prepare_host()
    torch.set_num_threads(2)
    init_distributed(launch_from_environment(), device)
    init_groups(config.parallel)
    (stage,) = configured_stage(config, device).chunks
    rows, length = config.training.micro_batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1))
    lens = np.array([length // 2 + 1, length // 2], np.int32)
    batch = local_batch(collate([Sample(row, lens, 0) for row in tokens]), device)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        loss, _ = stage(
            batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens,
            batch.local_cu_seqlens,
        )  # fmt: skip
        loss.backward()
        seconds.append(time.perf_counter() - begin)
    return rows * length / statistics.median(seconds[1:])


def write_index(folder: Path) -> None:
    """index.json and meta.json of MANY samples."""
    folder.mkdir()
    fields = columns("uint16", SEQ_LEN)
    shards: list[dict[str, Any]] = []
    left = MANY
    while left:
        samples = min(left, SHARD_SAMPLES)
        size = samples * (2 * SEQ_LEN + 32)
        shards.append(
            {
                "column_encodings": list(fields.values()), "column_names": list(fields),
                "column_sizes": [None, 8, 2 * SEQ_LEN + 2], "compression": None, "format": "mds",
                "hashes": ["xxh64"], "samples": samples, "size_limit": 1 << 26, "version": 2,
                "zip_data": None,
                "raw_data": {
                    "basename": f"shard.{len(shards):06d}.mds", "bytes": size,
                    "hashes": {"xxh64": f"{len(shards):016x}"},
                },
            }
        )  # fmt: skip
        left -= samples
    (folder / INDEX).write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    describe(folder, "mds", MANY)


def _open(folder: Path, start: Any, answers: Any) -> None:
    before = _own_bytes()
    start.wait()
    begin = time.perf_counter()
    blend = Blend([PackedDataset(folder)], seed=1)
    blend.order.locate(np.arange(MANY - 64, MANY + 64))  # over the border of an epoch
    answers.put((time.perf_counter() - begin, _own_bytes() - before))
    start.wait()  # until all have measured


def _own_bytes() -> int:
    """Of this process alone, not shared with any other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def opening(folder: Path) -> tuple[float, int]:
    """Seconds until the last of PROCESSES has opened MANY samples, and bytes they all take."""
    write_index(folder)
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(PROCESSES), context.Queue()
    ranks = [context.Process(target=_open, args=(folder, start, answers)) for _ in range(PROCESSES)]
    for rank in ranks:
        rank.start()
    found = [answers.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    return max(seconds for seconds, _ in found), sum(size for _, size in found)


def main(arguments: list[str]) -> int:
    """Print the tables; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.data_reading")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    console = Console(highlight=False, markup=False, width=110)
    met = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_all(folder)
        found = rates(readers(folder), 200 if quick else 1000, 3 if quick else 9)
        demo = demo_rate()
        table = Table("reading 8 × 4,096 tokens", "Mtokens/s", "of numpy", "of the demo's needs")
        shares = {}
        for label, rate in found.items():
            workers = int(label.split()[-2]) if label.endswith(" ahead") else 0
            same = found[ahead(NUMPY, workers)]
            table.add_row(label, f"{rate / 1e6:,.0f}", f"{rate / same:.0%}", f"{rate / demo:,.0f}×")
            shares[label] = rate / same
        console.print(table)
        bound = [MDS_BATCHES, ahead(MDS_BATCHES, 1), *(x for x in shares if x.endswith("samples"))]
        met += [min(shares[label] for label in bound) >= BOUNDS["read"]]
        met += [min(found.values()) / demo >= BOUNDS["demo"]]
        seconds, size = opening(folder / "many")
        console.print(
            f"opening {MANY:,} samples in {PROCESSES} processes at once: {seconds:.2f} s, "
            f"{size / 1e6:,.0f} MB together"
        )
        met += [seconds < BOUNDS["seconds"], size < BOUNDS["bytes"]]
    console.print(f"{sum(met)} of {len(met)} bounds met")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
