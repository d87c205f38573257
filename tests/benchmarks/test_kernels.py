"""What benchmarks/kernels.py times is the same computation, and its verdicts can fail."""

import torch

from benchmarks import kernels
from benchmarks.kernels import Measured, Problem
from tests.kernels.scan_cases import relative_error

CPU = torch.device("cpu")


def test_rivals_compute_the_same_scan():
    inputs = kernels.make_inputs(Problem("fp32", 192, 2, 3, 16, 32), CPU)
    names = [name for name, t in inputs.items() if t.requires_grad]
    results = []
    for scan in (kernels.ssd_without_state, kernels.plain_chunked):
        y = scan(**inputs)
        grads = torch.autograd.grad(y.square().sum(), [inputs[name] for name in names])
        results.append([y, *grads])
    for name, ours, theirs in zip(["y", *names], *results, strict=True):
        assert relative_error(ours, theirs) <= 1e-4, name


def test_peak_memory_counts_what_is_alive_at_once():
    def two_at_once():
        a = torch.ones(1 << 18)
        b = a + 1
        del a
        torch.neg(b)

    found = kernels.peak_memory(two_at_once, CPU)
    assert 2 * 4 << 18 <= found < (2 * 4 << 18) + 1024


def test_verdicts():
    def found(seconds: float, growth: float) -> dict[tuple[Problem, str], Measured]:
        short, long = Problem("fp32", 4096), Problem("fp32", 65536)
        return {
            (short, "ssd"): Measured(seconds, seconds, 100),
            (short, "sdpa"): Measured(6.5, 6.5, 100),
            (short, "plain"): Measured(2.0, 2.0, 100),
            (long, "ssd"): Measured(16 * seconds * growth, 16 * seconds * growth, 1600),
        }

    assert [met for met, _ in kernels.judge(found(1.0, 1.2), "fp32")] == [True] * 4
    assert [met for met, _ in kernels.judge(found(2.0, 1.4), "fp32")] == [False] * 3 + [True]
