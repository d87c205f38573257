"""How a host without CUDA is prepared."""

import resource

import torch

from benchmarks.ranks import run_ranks

BUFFERS, BYTES, ROUNDS = 4, 30 << 20, 10


def pages_mapped_in() -> list[int]:
    """Page faults of rounds that fill some buffers and free them all."""
    from parallel.compat import prepare_host

    prepare_host()
    found = []
    for _ in range(ROUNDS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffers = [torch.ones(BYTES, dtype=torch.uint8) for _ in range(BUFFERS)]
        del buffers
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found


def test_memory_of_a_step_stays_for_the_next() -> None:
    (faults,) = run_ranks(1, pages_mapped_in)
    pages = BUFFERS * BYTES // resource.getpagesize()
    assert max(faults[-3:]) < pages // 10, faults  # the first rounds find the places
