"""Micro-batches that only fill up the schedule of interleaved stages count nowhere."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity import MODEL, synthetic_batch
from benchmarks.ranks import run_ranks

WEIGHTS = torch.linspace(1, 9, MODEL["vocab_size"], dtype=torch.float64)


def tables(parallel: dict[str, Any]) -> list[Tensor]:
    """What evaluation says of one, two and three micro-batches."""
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import evaluate
    from parallel.sums import by_position

    device, layout = prepare_host(), ParallelConfig(**parallel)
    init_distributed(launch_from_environment(), device)
    init_groups(layout)
    built = build_stage(
        ModelConfig(**MODEL), layout, seq_len=64, dtype=torch.float32, seed=5,
        deterministic=False, device=device,
    )  # fmt: skip
    built.chunks[0].config.no_sync_func = None
    batches = [local_batch(synthetic_batch(0, range(n, n + 1), True), device) for n in range(3)]
    return [
        evaluate(list(built.chunks), batches[:count], by_position, 64, WEIGHTS)
        for count in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    "parallel",
    [{"pipeline": 2, "virtual_pipeline": 2}, {"pipeline": 2}, {"tensor": 2}],
    ids=str,
)
def test_evaluation_counts_every_batch_once(parallel: dict[str, Any]) -> None:
    alone = run_ranks(1, tables, {})[0]
    counted = sum(
        float(synthetic_batch(0, range(n, n + 1), True).loss_mask.sum()) for n in range(3)
    )
    assert float(alone[2][1].sum()) == counted
    for rank in run_ranks(2, tables, parallel):
        for found, expected in zip(rank, alone, strict=True):
            assert torch.equal(found[1], expected[1])
            assert torch.allclose(found, expected, rtol=1e-5)
