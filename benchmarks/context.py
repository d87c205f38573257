"""Long sequences under context parallelism: memory of a rank, and traffic between ranks.

    python -m benchmarks.context [--quick] [--lengths 16384,65536] [--context 4]

One step, forward and backward, of a model with one SSD and one attention layer, two heads each, on
one sequence that is a single document. Peak memory is what the step allocates on a rank; traffic is
the bytes a rank gives to collectives, by kind: all-gather and reduce-scatter exchange the scan's
states, all-to-all attention's heads, send and receive attention's ring.

Exits with 1 when a rank's peak is more than 1.15 of its share of what one process allocates (from
16,384 tokens on), when the states' traffic grows with the length, or when the loss is another.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import peak_memory
from benchmarks.ranks import run_ranks

MEMORY_BOUND = 1.15  # peak of a rank over its share of one process' peak
MEMORY_LENGTH = 16384  # of shorter ones the ring's tiles of scores are a larger part
LOSS_TOLERANCE = 1e-5
STATES = ("_allgather_base_", "_reduce_scatter_base_")


@dataclass(frozen=True)
class Step:
    loss: float
    peak: int  # bytes
    seconds: float
    traffic: dict[str, int]  # bytes by collective


class _Traffic(TorchDispatchMode):
    """Bytes given to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            given = args[0] if name in ("send", "recv_") else args[1]
            tensors = given if isinstance(given, list) else [given]
            size = sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
            self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def train_step(length: int, context: int) -> Step:
    """On one rank of `context`: two steps for the peak of the second, one more for the rest."""
    from data_pipeline.batch import Batch
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment

    model = ModelConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2,
        num_kv_heads=2, head_dim=32, state_dim=32, ssd_groups=2, attn_layer_period=2,
        attn_layer_offset=1, max_position_embeddings=length,
    )  # fmt: skip
    layout, device = ParallelConfig(context=context), prepare_host()
    init_distributed(launch_from_environment(), device)
    init_groups(layout)
    stage = build_stage(
        model, layout, seq_len=length, dtype=torch.float32, seed=1, deterministic=False,
        device=device,
    ).chunks[0]  # fmt: skip
    text = torch.randint(0, 256, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = local_batch(
        Batch(
            tokens=text[:, :-1].contiguous(),
            labels=text[:, 1:].contiguous(),
            loss_mask=torch.ones(1, length),
            position_ids=torch.arange(length)[None],
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            sources=torch.zeros(1, dtype=torch.int64),
        ),
        device,
    )
    losses = []

    def step() -> None:
        stage.zero_grad()
        loss, _ = stage(
            batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens,
            batch.local_cu_seqlens,
        )  # fmt: skip
        loss.backward()
        losses.append(loss.detach())

    peak = peak_memory(step, device)
    traffic, begin = _Traffic(), time.perf_counter()
    with traffic:
        step()
    seconds = time.perf_counter() - begin
    total = losses[-1].double()
    torch.distributed.all_reduce(total)
    return Step(float(total) / length, peak, seconds, traffic.bytes)


def main(arguments: list[str]) -> int:
    """Print the table and the verdicts; the exit code."""
    # of the processes to come: torch renames collectives that Megatron-core still calls
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    parser = argparse.ArgumentParser("python -m benchmarks.context")
    parser.add_argument("--quick", action="store_true", help="8,192 and 16,384 tokens")
    parser.add_argument("--lengths", default="16384,65536", help="[16384,65536]")
    parser.add_argument("--context", type=int, default=4, help="ranks [4]")
    options = parser.parse_args(arguments)
    lengths = [8192, 16384] if options.quick else [int(n) for n in options.lengths.split(",")]
    console = Console(highlight=False)
    table = Table(
        "tokens", "ranks", "loss", "peak MiB", "of its share", "s", "states B", "others B"
    )
    verdicts, states = [], []
    for length in lengths:
        one = run_ranks(1, train_step, length, 1)[0]
        _add_row(table, length, 1, one, one)
        ranks = run_ranks(options.context, train_step, length, options.context)
        worst = max(ranks, key=lambda step: step.peak)
        _add_row(table, length, options.context, worst, one)
        console.print(f"{length:,} tokens: done", style="dim")
        ratio = worst.peak / one.peak * options.context
        if length >= MEMORY_LENGTH:
            verdicts.append(
                (ratio <= MEMORY_BOUND, f"{length}: a rank's peak is {ratio:.3f} of its share")
            )
        error = abs(worst.loss / one.loss - 1)
        verdicts.append((error <= LOSS_TOLERANCE, f"{length}: the loss differs by {error:.1e}"))
        states.append({sum(step.traffic.get(name, 0) for name in STATES) for step in ranks})
    console.print(table)
    same = all(found == states[0] for found in states) and len(states[0]) == 1
    verdicts.append((same, f"states' traffic of a rank, by length: {states} bytes"))
    for met, sentence in verdicts:
        console.print(f"{'met   ' if met else 'MISSED'} {sentence}", style=None if met else "red")
    return 0 if all(met for met, _ in verdicts) else 1


def _add_row(table: Table, length: int, ranks: int, step: Step, one: Step) -> None:
    states = sum(step.traffic.get(name, 0) for name in STATES)
    others = sum(step.traffic.values()) - states
    share = step.peak / one.peak * ranks
    table.add_row(
        f"{length:,}", str(ranks), f"{step.loss:.6f}", f"{step.peak / 2**20:,.1f}", f"{share:.3f}",
        f"{step.seconds:.1f}", f"{states:,}", f"{others:,}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
