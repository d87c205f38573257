"""Every invalid layout dies before anything is built, and its error names a way out that works."""

import itertools
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pretrain.config import ConfigError, parse_config
from tests.pretrain.command import run_command

BASE: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 8, "num_heads": 4, "num_kv_heads": 4, "ssd_groups": 4},
    "data": {"train": "t", "validation": "v", "seq_len": 1024},
    "training": {"global_batch_size": 24, "micro_batch_size": 2},
    "parallel": {},
}
Case = tuple[dict[str, dict[str, Any]], int, str]  # changed fields, processes, the field to blame


def cases() -> Iterator[Case]:
    """One mistake each."""
    for tensor in (3, 5, 6, 7, 8, 9, 12, 16):
        yield {"parallel": {"tensor": tensor}}, tensor, "parallel.tensor"
    for tensor, field in itertools.product((2, 4), ("num_kv_heads", "ssd_groups")):
        yield {"parallel": {"tensor": tensor}, "model": {field: 1}}, tensor, "parallel.tensor"
    for tensor, width in itertools.product((2, 4), (511, 513, 255, 77)):
        model = {"intermediate_size": width}
        yield {"parallel": {"tensor": tensor}, "model": model}, tensor, "parallel.tensor"
    for tensor, length in itertools.product((2, 4), (1021, 1023, 513)):
        sections = {"data": {"seq_len": length}, "training": {"micro_batch_size": 1}}
        fields = {"tensor": tensor, "sequence": True}
        yield sections | {"parallel": fields}, tensor, "data.seq_len"
    for pipeline in range(9, 33):
        yield {"parallel": {"pipeline": pipeline}}, pipeline, "parallel.pipeline"
    for pipeline, zero in itertools.product(range(2, 9), (0, 2, 3)):
        yield (
            {"parallel": {"pipeline": pipeline, "zero_stage": zero}}, pipeline,
            "parallel.zero_stage",
        )  # fmt: skip
    for pipeline, recompute in itertools.product(range(2, 9), ("none", "full")):
        fields = {"pipeline": pipeline, "offload": "optimizer", "recompute": recompute}
        yield {"parallel": fields}, pipeline, "parallel.offload"
    for tensor in (1, 2, 4):
        fields = {"tensor": tensor, "offload": "optimizer", "zero_stage": 0}
        yield {"parallel": fields}, tensor, "parallel.offload"
    for virtual in range(2, 9):
        yield {"parallel": {"virtual_pipeline": virtual}}, 1, "parallel.virtual_pipeline"
    for pipeline, virtual in itertools.product((2, 3, 4, 5, 8), (5, 6, 8, 9)):
        fields = {"pipeline": pipeline, "virtual_pipeline": virtual}
        yield {"parallel": fields}, pipeline, "parallel.virtual_pipeline"
    for split in ([1, 6], [8], [4, 4, 0], [9, -1], [8, 0], [], [4, 4, 4], [2, 2, 2, 2], [7]):
        fields = {"pipeline": 2, "pipeline_split": split}
        yield {"parallel": fields}, 2, "parallel.pipeline_split"
    for split in ([4, 4], [2, 2, 2], [1, 1, 1, 1], [2, 2, 2, 2, 2], [5, 2, 1, 0]):
        fields = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_split": split}
        yield {"parallel": fields}, 2, "parallel.pipeline_split"
    for context in (3, 5, 6, 7, 9, 10, 11, 12, 13, 24):
        yield {"parallel": {"context": context}}, context, "parallel.context"
    for context, width in itertools.product((2, 4, 8), (1, 2, 3, 4)):
        sections = {"parallel": {"context": context}, "model": {"ssd_conv_width": width}}
        yield sections, context, "parallel.context"
    for layers in range(1, 9):
        yield {"parallel": {"recompute_layers": layers}}, 1, "parallel.recompute_layers"
    for tensor, pipeline, context in itertools.product((1, 2, 4), (1, 2), (1, 2, 4)):
        ranks = tensor * pipeline * context
        if ranks > 1:
            fields = {"tensor": tensor, "pipeline": pipeline, "context": context}
            for world in sorted({ranks + 1, 2 * ranks - 1}):
                yield {"parallel": fields}, world, "parallel.tensor"
    for world, context in itertools.product((5, 7, 8, 9, 10, 11, 16), (1, 2)):
        yield {"parallel": {"context": context}}, world * context, "training.global_batch_size"
    for pipeline, batch in itertools.product((2, 4), (2, 6, 10, 14, 18, 22)):
        sections = {
            "parallel": {"pipeline": pipeline, "virtual_pipeline": 2},
            "training": {"global_batch_size": batch},
        }
        yield sections, pipeline, "parallel.virtual_pipeline"


def tree(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: fields | sections.get(name, {}) for name, fields in BASE.items()}


def refusal(sections: dict[str, dict[str, Any]], world_size: int) -> str | None:
    """The error of a configuration on so many processes, if it has one."""
    try:
        parse_config(tree(sections)).data_parallel(world_size)
    except ConfigError as error:
        return str(error)
    return None


def ways_out(message: str, world_size: int) -> Iterator[tuple[dict[str, dict[str, Any]], int]]:
    """What the part of an error after its semicolon proposes: changed fields, processes."""
    proposal = message.rpartition("; ")[2]
    problem = message.partition("; ")[0]
    first = re.search(r"(\w+\.\w+)=", problem)
    assert first is not None
    for name, text in re.findall(r"(\w+\.\w+)=('\w+'|\w+)", proposal):
        yield change(name, tomllib.loads(f"v = {text}")["v"]), world_size
    for text in re.findall(r"use (?:one of \[|at most )?(\d+)", proposal):
        yield change(first[1], int(text)), world_size
    for text in re.findall(r"multiple of (\d+)", proposal):
        yield {}, int(text)
    if "'balanced'" in proposal:
        yield change("parallel.pipeline_split", "balanced"), world_size


def change(name: str, value: Any) -> dict[str, dict[str, Any]]:
    section, field = name.split(".")
    return {section: {field: value}}


def merge(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: a.get(name, {}) | b.get(name, {}) for name in a | b}


def test_all_are_refused_by_name_with_a_way_out_that_works() -> None:
    begin, every = time.perf_counter(), list(cases())
    assert len(every) >= 200
    assert len({repr(case) for case in every}) == len(every)
    for sections, world_size, field in every:
        message = refusal(sections, world_size)
        assert message is not None, (sections, world_size)
        assert field in message, (field, message)
        assert "\n" not in message
        proposals = list(ways_out(message, world_size))
        good = [
            proposal
            for proposal, processes in proposals
            if works(merge(sections, proposal), world_size, processes)
        ]
        assert good, (sections, world_size, message, proposals)
    assert time.perf_counter() - begin < 10


def works(sections: dict[str, dict[str, Any]], world_size: int, processes: int) -> bool:
    """Whether a layout runs on these processes, or on fewer, which its change set free."""
    fields = sections.get("parallel", {})
    ranks = 1
    for axis in ("tensor", "pipeline", "context"):
        ranks *= fields.get(axis, 1)
    return any(refusal(sections, n) is None for n in {world_size, processes, ranks})


def test_valid_neighbours_are_not_refused() -> None:
    for tensor, pipeline, context in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4)):
        fields = {"tensor": tensor, "pipeline": pipeline, "context": context}
        assert refusal({"parallel": fields}, tensor * pipeline * context * 3) is None


LAUNCHED: list[Case] = [
    ({"parallel": {"pipeline": 2, "zero_stage": 3}}, 2, "parallel.zero_stage=3"),
    ({"parallel": {"tensor": 2}}, 3, "parallel.tensor=2"),
]


def written(sections: dict[str, dict[str, Any]], folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(merge(BASE, sections)))
    return path


@pytest.mark.parametrize(("sections", "ranks", "found"), LAUNCHED)
def test_every_rank_of_a_launch_exits_with_2(
    sections: dict[str, dict[str, Any]], ranks: int, found: str, tmp_path: Path
) -> None:
    path = written(merge(sections, {"logging": {"run_dir": str(tmp_path / "run")}}), tmp_path)
    for end in run_command("pretrain", path, ranks=ranks):
        assert end.code == 2
        assert found in end.output
    assert not (tmp_path / "run").exists()


def test_torchrun_fails_with_the_message(tmp_path: Path) -> None:
    path = written({"parallel": {"context": 3}}, tmp_path)
    end = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "pretrain", "pretrain", str(path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert end.returncode != 0
    # torchrun ends the other rank as soon as one has failed, perhaps before it spoke
    assert "parallel.context=3 does not divide data.seq_len=1024" in end.stderr
