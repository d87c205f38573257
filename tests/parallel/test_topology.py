"""The rank order that `doctor --layout` prints is Megatron-core's."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from parallel.topology import AXES, Topology
from pretrain.cli import app
from pretrain.layout import axis_lines
from tests.pretrain.command import run_command, write_config

SIZES = st.integers(1, 4)


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, SIZES, SIZES)
def test_groups_are_megatrons(tensor: int, context: int, data: int, pipeline: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    theirs = RankGenerator(
        tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp"
    )
    ours = Topology(tensor, context, data, pipeline, ranks_per_node=8)
    for axis, token in zip(AXES, ("tp", "cp", "dp", "pp"), strict=True):
        assert sorted(ours.groups(axis)) == sorted(theirs.get_ranks(token))


def test_reach_of_groups() -> None:
    top = Topology(tensor=4, context=2, data=2, pipeline=2, ranks_per_node=8)
    assert [top.nodes_of_a_group(axis) for axis in AXES] == [1, 1, 2, 2]
    assert top.coordinates(29) == {"tensor": 1, "context": 1, "data": 1, "pipeline": 1}
    wide = axis_lines(Topology(8, 1, 1, 1, ranks_per_node=4))
    assert "over up to 2 nodes" in wide[0]
    assert "use a parallel.tensor that divides 4" in wide[0]


def layout(*words: str) -> str:
    config = Path(__file__).parents[2] / "configs" / "demo.toml"
    ended = CliRunner().invoke(app, ["doctor", "--layout", str(config), *words])
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_printed_layout() -> None:
    words = ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.context=2"]
    text = layout("--nodes", "2", "--gpus-per-node", "8", *words)
    assert "16 ranks on 2 nodes: tensor 2 × context 2 × data 2 × pipeline 2" in text
    assert "13: t1 c0 d1 p1" in text
    assert "tensor: 8 groups of 2, within a node; the first: 0, 1" in text
    assert "pipeline: 8 groups of 2, each over up to 2 nodes; the first: 0, 8" in text
    assert "stage 1: layers" in text


def test_a_layout_that_does_not_fit_is_refused() -> None:
    from pretrain.config import ConfigError

    with pytest.raises(ConfigError, match=r"parallel\.context=3 = 3 does not divide the 8"):
        layout("--parallel.context", "3", "--data.seq_len", "1023")


def on_two_nodes() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"


def test_tensor_parallel_over_nodes_is_warned_of(tiny_data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny_data, parallel={"tensor": 2}, training={"steps": 1})
    said = [end.output for end in run_command("pretrain", path, ranks=2, before=on_two_nodes)]
    assert "parallel.tensor=2 reaches over 2 nodes of 1 rank" in said[0]
    assert "reaches over" not in said[1]
