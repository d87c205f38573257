"""The same global batches, token for token, whoever reads them and from wherever they go on.

    python -m benchmarks.data_exactness [--quick]

Prepares two small corpora as MDS and as WebDataset shards and reads them, alone and as a blend
whose weights change twice, with global batches of 24 on 1, 2, 3, 4 and 8 data-parallel ranks, read
ahead by 0, 1 and 2 threads, from the beginning, the second step, the middle, the end and the second
round of an epoch. Samples are shuffled within windows of a fifth of the larger corpus. Every batch
is compared with one rank's uninterrupted reading of the MDS shards; every epoch of every source
must have each of its samples once.

Exits with 1 when anything differs.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_pipeline.blend import Blend, Stage
from data_pipeline.dataset import PackedDataset
from data_pipeline.loader import BatchLoader, BatchSize
from data_pipeline.meta import Format
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer

GLOBAL_BATCH, SEQ_LEN, STEPS = 24, 128, 12
SIZES = (1, 2, 3, 4, 8)
WORKERS = (0, 1, 2)
WINDOW_TOKENS = 1 << 14
FORMATS: tuple[Format, ...] = ("mds", "webdataset")
FOLDERS = ("data_pipeline", "kernels")


def prepare_all(folder: Path) -> None:
    """folder/FORMAT/NAME/train for every format and corpus, of this project's own sources."""
    root = Path(__file__).parents[1]
    sources = {name: sorted((root / name).rglob("*.py")) for name in FOLDERS}
    tokenizer = train_tokenizer(list(itertools.chain(*sources.values())), folder / "tok.json", 600)
    for kind, (name, files) in itertools.product(FORMATS, sources.items()):
        prepare(
            files, tokenizer, folder / kind / name, SEQ_LEN, validation_fraction=0, format=kind,
            workers=1, shard_bytes=1 << 16,
        )  # fmt: skip


def open_blend(folder: Path, several: bool) -> Blend:
    """One corpus, or both with weights that change at steps 3 and 40."""
    names = FOLDERS if several else FOLDERS[:1]
    stages = [Stage(0, (1.0,))]
    if several:
        weights = [(0.7, 0.3), (0.2, 0.8), (0.5, 0.5)]
        starts = [0, 3, 40]
        stages = [Stage(s * GLOBAL_BATCH, w) for s, w in zip(starts, weights, strict=True)]
    sources = [PackedDataset(folder / name / "train") for name in names]
    return Blend(sources, seed=11, names=names, stages=stages, window_tokens=WINDOW_TOKENS)


def global_batches(
    blend: Blend, size: int, workers: int, start: int, steps: int
) -> list[list[Tensor]]:
    """Every field of the batches of all ranks, rank after rank, for some steps."""
    found: list[list[Tensor]] = [[] for _ in range(steps)]
    for rank in range(size):
        loader = BatchLoader(
            blend, [BatchSize(0, GLOBAL_BATCH, GLOBAL_BATCH // size)], data_parallel_rank=rank,
            data_parallel_size=size, samples_consumed=start * GLOBAL_BATCH, num_workers=workers,
        )  # fmt: skip
        for step in range(steps):
            for batch in loader.next_step():
                fields = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
                found[step].append(torch.stack([field.double() for field in fields]))
        loader.close()
    return found


def same(found: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    """Whether batches are equal in every number, however they are cut into ranks."""
    return all(
        torch.equal(torch.cat(a, dim=1), torch.cat(b, dim=1))
        for a, b in zip(found, expected, strict=True)
    )


def epochs_are_whole(blend: Blend) -> bool:
    """Whether each source's first three epochs have every sample once."""
    total = 4 * max(blend.order.sizes) * len(blend.sources)
    sources, indices = blend.order.locate(np.arange(total))
    for source, size in enumerate(blend.order.sizes):
        read = indices[sources == source]
        for epoch in range(min(3, read.size // size)):
            if np.unique(read[epoch * size : (epoch + 1) * size]).size != size:
                return False
    return True


def main(arguments: list[str]) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.data_exactness")
    parser.add_argument("--quick", action="store_true", help="fewer steps from each point")
    steps = 3 if parser.parse_args(arguments).quick else STEPS
    sizes = (f"{size} ranks" for size in SIZES)
    table = Table("sources", "format", "from step", "threads", *sizes)
    missed = checked = 0
    with tempfile.TemporaryDirectory() as folder:
        prepare_all(Path(folder))
        for several, kind in itertools.product((False, True), FORMATS):
            oracle, blend = (open_blend(Path(folder) / k, several) for k in ("mds", kind))
            missed += not epochs_are_whole(blend)
            epoch = int(blend.order.sizes[0]) // GLOBAL_BATCH
            for start in (0, 1, epoch // 2, epoch, epoch + epoch // 2):
                expected = global_batches(oracle, 1, 0, start, steps)
                for workers in WORKERS:
                    results = [
                        same(global_batches(blend, size, workers, start, steps), expected)
                        for size in SIZES
                    ]
                    checked += len(results)
                    missed += results.count(False)
                    cells = ["same" if good else "DIFFERS" for good in results]
                    name = "a blend" if several else "one"
                    table.add_row(name, kind, str(start), str(workers), *cells)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"{checked} readings of {steps} steps: {'MISSED' if missed else 'met'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
