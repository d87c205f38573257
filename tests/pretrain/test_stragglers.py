"""The slow rank is named, and no other."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from parallel.launch import host_name
from pretrain.stragglers import slow_ranks
from tests.pretrain.command import read_metrics, run_command, write_config


def slow(rank: int, what: str) -> None:
    """A rank takes 50 ms longer to compute a step, or to read it."""
    from data_pipeline.blend import Blend
    from parallel.model import PipelineStage

    if os.environ["RANK"] != str(rank):
        return
    owner: Any = PipelineStage if what == "computing" else Blend
    name = "forward" if what == "computing" else "read"
    real = getattr(owner, name)

    def slowed(*words: Any) -> Any:
        time.sleep(0.15)
        return real(*words)

    setattr(owner, name, slowed)


@pytest.mark.parametrize("what", ["computing", "reading", "nothing"])
def test_slow_rank_is_named(what: str, tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_data, training={"steps": 8, "eval_every": 0, "global_batch_size": 6},
        logging={"stragglers_every": 4}, data={"num_workers": 0},
    )  # fmt: skip
    before = None if what == "nothing" else partial(slow, 1, what)
    ends = run_command("pretrain", config, ranks=3, before=before)
    assert [end.code for end in ends] == [0, 0, 0], ends[0].output
    counts = [line["stragglers"] for line in read_metrics(tmp_path / "run")]
    if what == "nothing":
        assert sum(counts) <= 1  # the machine's own doing
        return
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").open()]
    slow_ones = [e["said"] for e in events if e["event"] == "straggler"]
    named = [said for said in slow_ones if said.startswith(f"rank 1 on {host_name()}: {what}")]
    assert sum(counts) == len(slow_ones)
    assert counts[3] >= 1
    assert len(named) == 2
    assert len(named) >= len(slow_ones) - 1


def test_what_is_slow() -> None:
    ranks = [("node0", 0.001, 1.0), ("node0", 0.004, 1.2), ("node1", 0.001, 1.4), ("node1", 1, 1)]
    assert slow_ranks(ranks) == [
        "rank 3 on node1: reading 1.000 s a step, usually 0.003",
    ]
    assert slow_ranks([*ranks, ("node2", 0.0, 2.0)])[-1].startswith(
        "rank 4 on node2: computing 2.0"
    )


def slow_at_first(seconds: list[float]) -> list[list[str]]:
    """What is told over two windows of two steps, of a rank that takes so long in each."""
    import os

    from parallel.compat import prepare_host
    from parallel.groups import init_distributed
    from parallel.launch import launch_from_environment
    from pretrain.stragglers import Stragglers

    init_distributed(launch_from_environment(), prepare_host())
    ranks = Stragglers(2)
    own = seconds if os.environ["RANK"] == "1" else [0.1] * len(seconds)
    return [ranks.add(value, 0.1) for value in own]


def test_every_window_counts_by_itself() -> None:
    told, others = run_ranks(2, slow_at_first, [0.4, 0.6, 0.1, 0.1])
    assert not any(others)
    assert [len(said) for said in told] == [0, 1, 0, 0]
    assert "rank 1" in told[1][0]
    assert "reading 0.500 s a step" in told[1][0]
