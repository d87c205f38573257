"""Pipelines: balanced against equal splits, and the idle share of stages against the formula.

    python -m benchmarks.pipeline [--quick]

Split: 16 layers, of which two attend, on two and on four stages. A stage's time is the processor
time of its forward and backward passes, the median of several steps; the balanced split's slowest
stage is to be faster than the equal one's, as predicted and as measured.

Bubble: two stages of equal work, one thread each, with 2, 4 and 8 micro-batches; idle is the share
of a step's wall time in which a stage computes nothing. The formula (p - 1) / (v m + p - 1) knows
no time for sends: they are in the measured share.

Exits with 1 when a balanced split is not faster.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.ranks import run_ranks

MODEL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_layers": 16,
    "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "state_dim": 32, "ssd_groups": 4,
    "attn_layer_period": 8, "attn_layer_offset": 7,
}  # fmt: skip
# without attention and with a small vocabulary, the two stages' work is nearly equal
EVEN = MODEL | {"vocab_size": 128, "attn_layer_offset": 8}
SEQ_LEN = 512


@dataclass(frozen=True)
class Stage:
    """Seconds of a step, medians."""

    processor: float  # in forward and backward
    busy: float  # wall, in forward and backward
    step: float  # wall


def measure(
    model: dict[str, Any], parallel: dict[str, Any], micro_batches: int, steps: int
) -> Stage:
    """Of this rank."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from data_pipeline.collate import collate
    from data_pipeline.packing import Sample
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import count_tokens, forward_backward
    from parallel.zero import ZeroOptimizer

    device, layout = prepare_host(), ParallelConfig(**parallel)
    init_distributed(launch_from_environment(), device)
    init_groups(layout)
    built = build_stage(
        ModelConfig(**model), layout, seq_len=SEQ_LEN, dtype=torch.float32, seed=1,
        deterministic=False, device=device,
    )  # fmt: skip
    zero = ZeroOptimizer(
        built, layout, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip_grad_norm=1.0
    )
    processor, wall = [0.0], [0.0]

    def timed(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time(), time.perf_counter()
            result = function(*args, **kwargs)
            processor[-1] += time.process_time() - begin[0]
            wall[-1] += time.perf_counter() - begin[1]
            return result

        return run

    schedules.forward_step = timed(schedules.forward_step)
    schedules.backward_step = timed(schedules.backward_step)
    text = torch.randint(0, model["vocab_size"], (SEQ_LEN + 1,)).int().numpy()
    sample = Sample(text, torch.tensor([SEQ_LEN + 1]).int().numpy(), num_pad=0)
    batches = [local_batch(collate([sample] * 2), device) for _ in range(micro_batches)]
    tokens = count_tokens(batches, device)
    seconds = []
    for _ in range(steps + 1):
        processor.append(0.0)
        wall.append(0.0)
        torch.distributed.barrier()
        begin = time.perf_counter()
        forward_backward(zero, batches, tokens)
        seconds.append(time.perf_counter() - begin)
        zero.step(1e-3)
    busy = list(zip(processor[2:], wall[2:], seconds[1:], strict=True))  # the first step warms up
    return Stage(*(statistics.median(column) for column in zip(*busy, strict=True)))


def predicted(parallel: dict[str, Any]) -> float:
    """FLOPs per token of the slowest stage, forward."""
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.flops import head_flops, layer_flops
    from parallel.split import layer_chunks

    model, layout = ModelConfig(**MODEL), ParallelConfig(**parallel)
    stages = [
        sum(layer_flops(model, layer, SEQ_LEN) for layer in chunk)
        for chunk in layer_chunks(model, layout, SEQ_LEN)
    ]
    return max([*stages[:-1], stages[-1] + head_flops(model)])


def compare_splits(stages: int, steps: int, table: Table) -> bool:
    """Add two rows; whether the balanced split is faster, as predicted and as measured."""
    slowest = {}
    for split in ("balanced", [16 // stages] * stages):
        parallel = {"pipeline": stages, "pipeline_split": split}
        ranks = run_ranks(stages, measure, MODEL, parallel, 4, steps)
        times = [rank.processor for rank in ranks]
        slowest[str(split)] = (predicted(parallel), max(times))
        table.add_row(
            str(stages), _counts(parallel), f"{predicted(parallel) / 1e6:.2f}",
            f"{max(times):.3f}", "  ".join(f"{t:.3f}" for t in times),
        )  # fmt: skip
    balanced, equal = slowest.values()
    return balanced[0] < equal[0] and balanced[1] < equal[1]


def _counts(parallel: dict[str, Any]) -> str:
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.split import layer_chunks

    chunks = layer_chunks(ModelConfig(**MODEL), ParallelConfig(**parallel), SEQ_LEN)
    return " ".join(str(len(chunk)) for chunk in chunks)


def main(arguments: list[str]) -> int:
    """Print the tables; the exit code."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    parser = argparse.ArgumentParser("python -m benchmarks.pipeline")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args(arguments)
    steps = 3 if options.quick else 9
    console = Console(highlight=False, markup=False)
    splits = Table("stages", "layers", "MFLOP/token, slowest", "s, slowest", "s, each stage")
    met = [compare_splits(stages, steps, splits) for stages in (2, 4)]
    console.print(splits)
    bubbles = Table("chunks a stage", "micro-batches", "idle, stage 0", "stage 1", "formula")
    for virtual in (1, 2):
        for micro_batches in (2, 4, 8):
            parallel = {"pipeline": 2, "virtual_pipeline": virtual}
            split = [8 // virtual] * (2 * virtual)
            ranks = run_ranks(
                2, measure, EVEN, parallel | {"pipeline_split": split}, micro_batches, steps
            )
            idle = [1 - rank.busy / rank.step for rank in ranks]
            formula = 1 / (virtual * micro_batches + 1)
            bubbles.add_row(
                str(virtual), str(micro_batches), *(f"{share:.1%}" for share in idle),
                f"{formula:.1%}",
            )  # fmt: skip
    console.print(bubbles)
    console.print(f"balanced split faster: {'met' if all(met) else 'MISSED'}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
