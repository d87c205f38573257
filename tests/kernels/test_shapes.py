"""Which shape a scan takes, and what it moves in it."""

import pytest
import torch

from kernels.audit.cases import SCANS, SMALL_TARGET
from kernels.audit.compiling import TARGETS
from kernels.ssd import traffic
from kernels.ssd.choice import choose_shape
from kernels.ssd.shapes import Problem, Shape, segmented
from kernels.ssd.tiles import tile
from kernels.target import Target
from parallel.flops import SCAN_CHUNK

H100 = TARGETS["sm_90"]


def chosen(problem: Problem, target: Target, backward: bool) -> Shape:
    choice = tile(target, problem.dtype, problem.head_dim, problem.state_dim, 0)
    return choose_shape(problem, choice, target, backward)


def moved(problem: Problem, target: Target) -> list[int]:
    """Bytes forward and backward."""
    choice = tile(target, problem.dtype, problem.head_dim, problem.state_dim, 0)
    return [
        count(problem, choice, choose_shape(problem, choice, target, backward)).total
        for backward, count in ((False, traffic.forward), (True, traffic.backward))
    ]


def of_320m(groups: int, length: int = 4096) -> Problem:
    return Problem(8, length, 12, groups, 64, 128, torch.bfloat16)


def test_a_gpu_is_filled_twice_at_twice_the_least_traffic() -> None:
    problem = of_320m(12)
    for backward, bound in ((False, 2.0), (True, 1.7)):
        shape = chosen(problem, H100, backward)
        assert shape.kind == "segmented"
        assert (shape.segments - 1) * 8 * 12 >= 264  # programs of each of two launches
        assert moved(problem, H100)[backward] <= bound * traffic.minimum(problem)[backward]


def test_rows_are_not_cut_where_segments_are_switched_off() -> None:
    problem = of_320m(12)
    choice = tile(H100, problem.dtype, problem.head_dim, problem.state_dim, 0)
    for backward in (False, True):
        assert chosen(problem, H100, backward).kind == "segmented"
        whole = choose_shape(problem, choice, H100, backward, may_segment=False)
        assert whole.kind != "segmented"


def test_rows_are_not_cut_where_there_are_enough() -> None:
    problem = Problem(8, 4096, 16, 16, 128, 128, torch.bfloat16)
    for backward, before in ((False, 1.7683), (True, 1.5939)):
        assert chosen(problem, H100, backward) == Shape("fused")
        assert moved(problem, H100)[backward] <= before * traffic.minimum(problem)[backward]


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
def test_sharing_groups_moves_fewer_bytes(name: str) -> None:
    forward, backward = zip(
        *(moved(of_320m(groups), TARGETS[name]) for groups in (12, 4, 1)), strict=True
    )
    assert forward[0] > forward[1] > forward[2]
    assert backward[0] > backward[1] > backward[2]


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_sharing_groups_moves_fewer_bytes_where_states_are_not_held(name: str) -> None:
    forward, backward = zip(
        *(moved(of_320m(groups), TARGETS[name]) for groups in (12, 6, 4, 1)), strict=True
    )
    assert sorted(forward, reverse=True) == list(forward)
    assert sorted(backward, reverse=True) == list(backward)
    assert len(set(backward)) == 4


@pytest.mark.parametrize("stated", SCANS, ids=str)
def test_small_cases_of_the_audit_take_the_shapes_of_the_stated_ones(
    stated: tuple[int, int, int, int, int, int, torch.dtype],
) -> None:
    small = Problem(1, *SCANS[stated], *stated[4:])
    for backward in (False, True):
        here = chosen(small, SMALL_TARGET, backward)
        there = chosen(Problem(*stated), H100, backward)
        assert (here.kind, here.span) == (there.kind, there.span)
        assert (here.heads > 1) == (there.heads > 1)


@pytest.mark.parametrize("chunks", [3, 4, 5, 31, 64, 1000])
def test_segments_are_the_whole_row(chunks: int) -> None:
    for segments in range(3, min(chunks, 40) + 1):
        shape = segmented(chunks, segments, 1)
        parts = [shape.chunks_of(n, chunks) for n in range(segments)]
        assert all(len(part) > 0 for part in parts)
        assert [chunk for part in parts for chunk in part] == list(range(chunks))


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
@pytest.mark.parametrize("size", [64, 128])
def test_flops_count_the_chunk_that_runs(name: str, size: int) -> None:
    for chunk_size, runs in ((0, SCAN_CHUNK), (256, SCAN_CHUNK), (32, 32)):
        choice = tile(TARGETS[name], torch.bfloat16, size, 128, chunk_size)
        assert choice.chunk == runs
