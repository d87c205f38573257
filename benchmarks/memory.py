"""The memory model against what runs really hold, category by category.

    python -m benchmarks.memory [--quick] [--only NAME ...]

Trains a small model for two steps under each layout, on CPU processes, and counts the bytes of live
tensors of every rank in the second. Where `transxssm estimate` predicts a category (with the CPU's
operations) of at least 1 % of the peak, it is to be within 10 % of that count, on every rank.

Exits with 1 when one is not.
"""

import argparse
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.live_bytes import LiveBytes, storage_bytes
from benchmarks.parity import Layout
from benchmarks.ranks import run_ranks

BOUND, SHARE = 0.1, 0.01
SEQ_LEN, MICRO_BATCH, MICRO_BATCHES = 256, 2, 4
MODEL: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 128, "intermediate_size": 320, "num_layers": 6,
    "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "state_dim": 16, "ssd_groups": 4,
    "attn_layer_period": 3, "attn_layer_offset": 2,
}  # fmt: skip
LAYOUTS = [
    Layout(1, {}),
    Layout(1, {}, dtype="bf16"),
    Layout(1, {"recompute": "selective"}),
    Layout(1, {"recompute": "full", "recompute_layers": 4}, dtype="bf16"),
    Layout(2, {}, dtype="bf16"),
    Layout(2, {"zero_stage": 0}, dtype="bf16"),
    Layout(2, {"zero_stage": 2}),
    Layout(2, {"zero_stage": 2}, dtype="bf16"),
    Layout(2, {"zero_stage": 3}, dtype="bf16"),
    Layout(4, {"zero_stage": 3, "tensor": 2}),
    Layout(2, {"tensor": 2}),
    Layout(2, {"tensor": 2, "sequence": False, "recompute": "selective"}),
    Layout(2, {"context": 2}, dtype="bf16"),
    Layout(4, {"context": 4, "recompute": "full"}),
    Layout(2, {"pipeline": 2}),
    Layout(4, {"pipeline": 4}, dtype="bf16"),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    Layout(8, {"tensor": 2, "pipeline": 2, "context": 2}),
]
NAMES = (
    "weights", "gradients", "master", "moments", "gathered", "activations", "logits", "peak"
)  # fmt: skip
QUICK = [LAYOUTS[i] for i in (1, 3, 6, 8, 10, 12, 14, 16)]


def measure(layout: Layout) -> dict[str, int]:
    """Bytes by category on this rank, in the second step; `peak`: of all live tensors."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    import parallel.model
    from data_pipeline.collate import collate
    from data_pipeline.packing import Sample
    from parallel.build import DTYPES, build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import count_tokens, forward_backward
    from parallel.zero import ZeroOptimizer

    device, parallel_config = prepare_host(), ParallelConfig(**layout.parallel)
    init_distributed(launch_from_environment(), device)
    init_groups(parallel_config)
    live = LiveBytes()
    marks = {"before": 0, "held": 0, "logits": 0, "gathered": 0}

    def gathered() -> int:
        """Parameters that are whole just now, under ZeRO 3."""
        if parallel_config.zero_stage < 3:
            return 0
        return storage_bytes([p for _, p in built.named_parameters() if p.numel()])

    def head_loss(*args: Any) -> Any:
        start, before = live.now, live.peak
        live.peak = start
        result = whole_head(*args)
        marks["logits"] = min(marks["logits"] or live.peak, live.peak - live.now)
        live.peak = max(live.peak, before)
        return result

    def backward_step(*args: Any, **kwargs: Any) -> Any:
        if not marks["held"]:
            marks["gathered"] = gathered()
            marks["held"] = live.now - marks["gathered"]
        return whole_backward(*args, **kwargs)

    whole_head = parallel.model.head_loss
    parallel.model.head_loss = head_loss  # type: ignore[assignment]
    whole_backward, schedules.backward_step = schedules.backward_step, backward_step
    with live:
        built = build_stage(
            ModelConfig(**MODEL), parallel_config, seq_len=SEQ_LEN, dtype=DTYPES[layout.dtype],
            seed=5, deterministic=False, device=device,
        )  # fmt: skip
        tables = [t for c in built.chunks for pair in c._tables.values() for t in pair]
        zero = ZeroOptimizer(
            built, parallel_config, lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.01,
            clip_grad_norm=1.0,
        )  # fmt: skip
        random = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
        batches: list[Any] = []
        for _ in range(2):
            batches.clear()
            buffers = live.now
            samples = [
                Sample(torch.randint(0, 500, (SEQ_LEN + 1,), generator=random).int().numpy(),
                       torch.tensor([SEQ_LEN // 2 + 1, SEQ_LEN // 2]).int().numpy(), num_pad=0)
                for _ in range(MICRO_BATCH * MICRO_BATCHES)
            ]  # fmt: skip
            batches += [
                local_batch(collate(samples[at : at + MICRO_BATCH]), device)
                for at in range(0, len(samples), MICRO_BATCH)
            ]
            tokens = count_tokens(batches, device)
            marks |= {"before": live.now, "held": 0, "logits": 0}
            live.peak = live.now
            forward_backward(zero, batches, tokens)
            after = live.now - gathered()
            zero.step(1e-3)
    masters = zero._flat_masters()
    states = [zero.adam.state[master] for master in masters]
    parameters = [getattr(p, "ds_tensor", p) for _, p in built.named_parameters()]
    fixed = {
        "weights": storage_bytes(parameters),
        "master": storage_bytes(masters),
        "moments": storage_bytes([s[k] for s in states for k in ("exp_avg", "exp_avg_sq")]),
        "tables": storage_bytes(tables),
    }
    return fixed | {
        "gradients": buffers - sum(fixed.values()) + after - marks["before"],
        "activations": marks["held"] - marks["before"],
        "logits": marks["logits"],
        "gathered": marks["gathered"],
        "peak": live.peak,
    }


def predict(layout: Layout, rank: int) -> dict[str, int]:
    """The model's bytes of the same categories."""
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.footprint import Workload
    from parallel.memory import memory_by_stage
    from parallel.split import layer_chunks
    from parallel.topology import topology

    parallel = ParallelConfig(**layout.parallel)
    data = layout.world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    stage = topology(parallel, data, layout.world_size).coordinates(rank)["pipeline"]
    itemsize = 2 if layout.dtype == "bf16" else 4
    work = Workload(data, SEQ_LEN, MICRO_BATCH, MICRO_BATCHES, itemsize, on_gpu=False)
    model = ModelConfig(**MODEL)
    chunks = layer_chunks(model, parallel, SEQ_LEN)
    memory = memory_by_stage(model, parallel, work, chunks)[stage]
    buckets = memory.communication if memory.reduces_in_backward else 0  # else gone by then
    return memory.by_category() | {
        "gradients": memory.gradients + buckets,
        "peak": memory.peak,
    }


def compared(found: dict[str, int], predicted: dict[str, int], name: str) -> float | None:
    """Predicted over measured, or None of a category that is too small to matter."""
    small = max(found[name], predicted[name]) < SHARE * found["peak"]
    return None if small else predicted[name] / max(1, found[name])


def main(arguments: list[str]) -> int:
    """Print the table; the exit code."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    parser = argparse.ArgumentParser("python -m benchmarks.memory")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} layouts")
    parser.add_argument("--only", nargs="+", default=[""], help="layouts whose names contain this")
    options = parser.parse_args(arguments)
    layouts = [
        layout
        for layout in (QUICK if options.quick else LAYOUTS)
        if any(word in layout.name for word in options.only)
    ]
    table = Table("layout", "rank", *NAMES, title="measured KiB, and predicted / measured")
    worst = dict.fromkeys(NAMES, 0.0)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    for layout in layouts:
        for rank, found in enumerate(run_ranks(layout.world_size, measure, layout)):
            predicted = predict(layout, rank)
            cells = []
            for name in NAMES:
                ratio = compared(found, predicted, name)
                if ratio is None:
                    cells.append("-")
                    continue
                worst[name] = max(worst[name], abs(ratio - 1))
                cells.append(f"{found[name] / 1024:,.0f}  {ratio:.3f}")
            table.add_row(layout.name if rank == 0 else "", str(rank), *cells)
        console.print(f"{layout.name}: done", style="dim")
    console.print(table)
    for name, error in worst.items():
        console.print(f"{name}: at most {error:.1%} from what was measured")
    missed = [name for name, error in worst.items() if error > BOUND]
    console.print(f"{len(layouts)} layouts: {'MISSED ' + ', '.join(missed) if missed else 'met'}")
    return 1 if missed or not layouts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
