"""Every parallel layout against one process: the same losses, gradients and parameters.

    python -m benchmarks.parity [--quick] [--only NAME ...] [--steps 10] [--graphs]

A model of four layers learns synthetic text on up to 8 processes. For each layout, the worst
relative difference from one process of the loss over all steps, of the global gradient norm over
all steps, of every parameter's gradient at the first step and of every parameter after the last,
norm-wise per tensor. float32 layouts are held to 1e-4; bf16 ones, measured against float32, to 1e-2
for losses and 5e-2 for all else. Leak: whether the text of a document changes the loss or any
gradient of the others by a bit.

--graphs: the layouts whose micro-batches can be graphs, with graphs (on a CPU, recordings).

Adam's eps is 1e-5, so that a gradient near zero does not turn an update round. Exits with 1 when a
layout is out of bounds.
"""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.ranks import run_ranks

SEQ_LEN = 64
GLOBAL_BATCH, MICRO_BATCH = 16, 2
LR = 1e-3
MODEL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 8, "state_dim": 16, "ssd_groups": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1, "ssd_skip": True,
}  # fmt: skip
BOUNDS = {
    "fp32": {"loss": 1e-4, "norm": 1e-4, "gradient": 1e-4, "parameter": 1e-4, "leak": 0},
    "bf16": {"loss": 1e-2, "norm": 5e-2, "gradient": 5e-2, "parameter": 5e-2, "leak": 0},
}


@dataclass(frozen=True)
class Layout:
    world_size: int
    parallel: dict[str, Any]
    packed: bool = True
    dtype: str = "fp32"
    graphs: bool = False

    @property
    def name(self) -> str:
        parts = [f"{field}={value}" for field, value in self.parallel.items()]
        parts += [] if self.packed else ["one document a row"]
        parts += [] if self.dtype == "fp32" else [self.dtype]
        parts += ["graphs"] if self.graphs else []
        return f"{self.world_size} ranks: {', '.join(parts) or 'data'}"


def _layouts() -> list[Layout]:
    fp32: list[tuple[int, dict[str, Any]]] = [
        (2, {}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": False}),
        (2, {"pipeline": 2}),
        (4, {"pipeline": 4}),
        (2, {"pipeline": 2, "pipeline_split": [1, 3], "recompute": "full"}),
        (2, {"context": 2}),
        (4, {"context": 4}),
        (8, {"context": 8}),
        (2, {"context": 2, "recompute": "selective"}),
        (4, {"context": 2, "zero_stage": 2}),
        (4, {"context": 4, "zero_stage": 3, "recompute": "full"}),
        (4, {"tensor": 2, "context": 2}),
        (8, {"tensor": 2, "context": 4}),
        (4, {"tensor": 2, "pipeline": 2}),
        (4, {"tensor": 2, "zero_stage": 2}),
        (4, {"tensor": 2, "zero_stage": 3, "recompute": "selective"}),
        (4, {"pipeline": 2, "context": 2}),
        (4, {"pipeline": 2, "recompute": "selective"}),
        (8, {"tensor": 2, "pipeline": 2, "context": 2}),
        (8, {"tensor": 2, "pipeline": 2, "sequence": False, "recompute": "full"}),
        (8, {"tensor": 2, "context": 2, "zero_stage": 3}),
        (8, {"pipeline": 4, "context": 2}),
        (8, {"zero_stage": 3}),
        (2, {"zero_stage": 0}),
        (4, {"tensor": 2, "context": 2, "zero_stage": 0}),
        (2, {"zero_stage": 1, "offload": "optimizer"}),
        (4, {"tensor": 2, "zero_stage": 2, "offload": "optimizer"}),
        (4, {"context": 2, "zero_stage": 3, "offload": "optimizer"}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (8, {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "recompute": "full"}),
        (8, {"pipeline": 2, "virtual_pipeline": 2, "context": 2, "recompute": "selective"}),
        (2, {"recompute": "full", "recompute_layers": 3}),
    ]
    found = [Layout(*layout) for layout in fp32]
    found += [
        Layout(size, parallel, packed=False)
        for size, parallel in [
            (4, {"context": 4}),
            (4, {"tensor": 2, "pipeline": 2}),
        ]
    ]
    bf16: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (2, {"zero_stage": 3}),
        (4, {"tensor": 2, "context": 2}),
        (4, {"pipeline": 2, "context": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"zero_stage": 0}),
        (2, {"zero_stage": 1, "offload": "optimizer"}),
        (2, {"zero_stage": 2, "offload": "optimizer"}),
        (2, {"zero_stage": 3, "offload": "optimizer"}),
    ]
    found += [Layout(*layout, dtype="bf16") for layout in bf16]
    return found


LAYOUTS = _layouts()
QUICK = [LAYOUTS[i] for i in (2, 7, 10, 14, 18, 21, 29, 31, 33, 36, 41)]


@dataclass(frozen=True)
class Trace:
    """Of one rank. Tensors come with what their parameter is globally."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, tuple[Any, Tensor]]  # reduced, of the first step
    parameters: dict[str, tuple[Any, Tensor]]  # float32, after the last step
    leaks: bool  # whether a document changed the loss or a gradient of the others


def train(layout: Layout, steps: int) -> Trace:
    """Some steps of a layout, on one of its ranks."""
    from megatron.core import parallel_state

    from parallel.build import DTYPES, build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.graphs import MicroBatchGraphs, graph_maker
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import count_tokens, forward_backward
    from parallel.zero import ZeroOptimizer

    device, parallel = prepare_host(), ParallelConfig(**layout.parallel)
    init_distributed(launch_from_environment(), device)
    init_groups(parallel)
    built = build_stage(
        ModelConfig(**MODEL), parallel, seq_len=SEQ_LEN, dtype=DTYPES[layout.dtype], seed=5,
        deterministic=False, device=device,
    )  # fmt: skip
    zero = ZeroOptimizer(
        built, parallel, lr=LR, betas=(0.9, 0.95), eps=1e-5,
        weight_decay=0.01, clip_grad_norm=1.0,
    )  # fmt: skip
    run = MicroBatchGraphs(zero, graph_maker(device)).run if layout.graphs else None
    rank = parallel_state.get_data_parallel_rank()
    share = GLOBAL_BATCH // parallel_state.get_data_parallel_world_size()
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        rows = range(rank * share, (rank + 1) * share)
        batches = [
            local_batch(synthetic_batch(step, rows[at : at + MICRO_BATCH], layout.packed), device)
            for at in range(0, share, MICRO_BATCH)
        ]
        tokens = count_tokens(batches, device)
        losses.append(float(forward_backward(zero, batches, tokens, 1, run).mean))
        if step == 0:
            gradients = zero.full_gradients()
        norms.append(zero.step(LR).grad_norm)
    parameters = zero.full_parameters()
    seen = []
    for altered in (False, True):  # with a document of each row left out of the loss
        rows = range(rank * share, (rank + 1) * share)
        batches = [
            local_batch(without_one(rows[at : at + MICRO_BATCH], layout.packed, altered), device)
            for at in range(0, share, MICRO_BATCH)
        ]
        loss = forward_backward(zero, batches, count_tokens(batches, device), 1, run).mean
        seen.append([loss, *zero.full_gradients().values()])
        zero.step(0.0)  # nothing changes but Adam's moments
    leaks = not all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    return Trace(
        losses,
        norms,
        {name: (built.infos[name], gradient) for name, gradient in gradients.items()},
        {name: (built.infos[name], value) for name, value in parameters.items()},
        leaks,
    )


def synthetic_batch(step: int, rows: range, packed: bool) -> Any:
    """Rows of a step's global batch, the same whoever asks."""
    from data_pipeline.collate import collate

    return collate(synthetic_rows(step, rows, packed))


def without_one(rows: range, packed: bool, altered: bool) -> Any:
    """Rows of a batch with a document of each left out of the loss (of whole-row documents, every
    other one); `altered`: that document says something else."""
    from data_pipeline.collate import collate

    samples = synthetic_rows(0, rows, packed)
    masks = []
    for row, sample in zip(rows, samples, strict=True):
        document = np.repeat(np.arange(len(sample.doc_lens)), sample.doc_lens)
        out = document == row % (len(sample.doc_lens) if packed else 2)
        if altered:
            sample.tokens[out] = (sample.tokens[out] * 7 + 1) % 300
        masks.append(~(out[:-1] | out[1:]))  # neither read from there nor to be predicted there
    batch = collate(samples)
    batch.loss_mask.mul_(torch.from_numpy(np.stack(masks)))
    return batch


def synthetic_rows(step: int, rows: range, packed: bool) -> list[Any]:
    """Arithmetic text in documents of 1 to 40 tokens, or of a whole row."""
    from data_pipeline.packing import Sample

    samples = []
    for row in rows:
        random = np.random.default_rng((step, row))
        lengths = [SEQ_LEN + 1]
        if packed:
            cuts = np.unique(random.integers(1, SEQ_LEN, 5))
            lengths = np.diff([0, *cuts, SEQ_LEN + 1]).tolist()
        pieces = [
            (random.integers(0, 300) + random.integers(1, 7) * np.arange(n)) % 300 for n in lengths
        ]
        tokens = np.concatenate(pieces).astype(np.int32)
        samples.append(Sample(tokens, np.array(lengths, np.int32), num_pad=0))
    return samples


def assemble(parts: list[dict[str, tuple[Any, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors from the ranks' parts."""
    whole: dict[str, Tensor] = {}
    for tensors in parts:
        for name, (info, local) in tensors.items():
            target = whole.setdefault(name, torch.full(info.global_shape, torch.nan))
            for part in info.ranges:
                target.narrow(info.dim, part.start, part.length).copy_(
                    local.narrow(info.dim, part.local, part.length)
                )
    return whole


def compare(layout: Layout, one: list[Trace], steps: int) -> dict[str, float]:
    """Worst relative differences of a layout from one process."""
    ranks = run_ranks(layout.world_size, train, layout, steps)

    def series(name: str) -> float:
        expected = getattr(one[0], name)
        return max(
            abs(a / b - 1)
            for trace in ranks
            for a, b in zip(getattr(trace, name), expected, strict=True)
        )

    def tensors(name: str) -> float:
        expected = assemble([getattr(trace, name) for trace in one])
        found = assemble([getattr(trace, name) for trace in ranks])
        if found.keys() != expected.keys():
            raise AssertionError(f"{layout.name}: holds {sorted(found.keys() ^ expected.keys())}")
        worst = torch.stack(
            [(found[key] - value).norm() / value.norm() for key, value in expected.items()]
        )
        return float(worst.max())

    return {
        "loss": series("losses"),
        "norm": series("norms"),
        "gradient": tensors("gradients"),
        "parameter": tensors("parameters"),
        "leak": float(any(trace.leaks for trace in ranks)),
    }


def _can_be_graphs(layout: Layout) -> bool:
    from parallel.config import ParallelConfig
    from parallel.graphs import why_eager

    return why_eager(ParallelConfig(**layout.parallel)) is None


def main(arguments: list[str]) -> int:
    """Print the table; the exit code."""
    # of the processes to come: torch renames collectives that Megatron-core still calls
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    parser = argparse.ArgumentParser("python -m benchmarks.parity")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} layouts")
    parser.add_argument("--only", nargs="+", default=[""], help="layouts whose names contain this")
    parser.add_argument("--steps", type=int, default=10, help="[10]")
    parser.add_argument("--graphs", action="store_true", help="micro-batches as graphs")
    options = parser.parse_args(arguments)
    layouts = [
        layout
        for layout in (QUICK if options.quick and not options.graphs else LAYOUTS)
        if any(word in layout.name for word in options.only)
    ]
    if options.graphs:
        layouts = [replace(layout, graphs=True) for layout in layouts if _can_be_graphs(layout)]
    console = Console(highlight=False, markup=False)
    table = Table("layout", "loss", "norm", "gradient", "parameter", "leak", "")
    one = {
        packed: run_ranks(1, train, Layout(1, {}, packed), options.steps)
        for packed in (True, False)
    }
    missed = 0
    for layout in layouts:
        found = compare(layout, one[layout.packed], options.steps)
        met = all(found[name] <= bound for name, bound in BOUNDS[layout.dtype].items())
        missed += not met
        leak = "yes" if found.pop("leak") else "none"
        figures = [f"{value:.1e}" for value in found.values()] + [leak]
        table.add_row(layout.name, *figures, "met" if met else "MISSED")
        console.print(f"{layout.name}: {' '.join(figures)}", style="dim")
    console.print(table)
    console.print(f"{len(layouts) - missed} of {len(layouts)} layouts met")
    return 1 if missed or not layouts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
