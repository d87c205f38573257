"""Counted traffic against counts made by hand."""

import torch
import triton
import triton.language as tl

from kernels.audit.traffic import KernelTraffic, count_traffic


@triton.jit
def _add_row(X, ROW, OUT, columns, N: tl.constexpr):
    """One program a row; each loads all of ROW."""
    start, lane = tl.program_id(0) * columns, tl.arange(0, N)
    inside = lane < columns
    x = tl.load(X + start + lane, mask=inside)
    tl.store(OUT + start + lane, x + tl.load(ROW + lane, mask=inside), mask=inside)


@triton.jit
def _total(X, OUT, N: tl.constexpr):
    x = tl.load(X + tl.program_id(0) * N + tl.arange(0, N))
    tl.atomic_add(OUT, tl.sum(x))


def test_every_programs_accesses_count_and_distinct_bytes_once():
    x, row = torch.randn(6, 50).bfloat16(), torch.randn(50)
    out, total = torch.empty(6, 50), torch.zeros(1)
    _add_row[(6,)](x, row, out, 50, 64)  # outside: not counted
    with count_traffic() as both:
        with count_traffic() as first:
            _add_row[(6,)](x, row, out, 50, 64)
        _add_row[(3,)](x, row, out, 50, 64)
        _total[(4,)](torch.ones(64), total, 16)
    assert first == {
        "_add_row": KernelTraffic(
            launches=1,
            programs=6,
            loaded=6 * 50 * (2 + 4),
            stored=6 * 50 * 4,
            unique_loaded=6 * 50 * 2 + 50 * 4,
            unique_stored=6 * 50 * 4,
        )
    }
    assert both == {
        "_add_row": KernelTraffic(
            launches=2,
            programs=9,
            loaded=9 * 50 * (2 + 4),
            stored=9 * 50 * 4,
            unique_loaded=9 * 50 * 2 + 2 * 50 * 4,
            unique_stored=9 * 50 * 4,
        ),
        "_total": KernelTraffic(
            launches=1, programs=4, loaded=64 * 4, atomic=4 * 4, unique_loaded=64 * 4
        ),
    }
    assert total.item() == 64


def test_a_kernel_in_place_loads_and_stores_the_same_bytes():
    x = torch.randn(6, 50)
    with count_traffic() as traffic:
        _add_row[(6,)](x, torch.randn(50), x, 50, 64)
    counted = traffic["_add_row"]
    assert (counted.unique_loaded, counted.unique_stored) == (6 * 50 * 4 + 50 * 4, 6 * 50 * 4)
