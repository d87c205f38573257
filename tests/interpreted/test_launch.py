"""Kernels are launched on the GPU of their tensors, whichever is current."""

from contextlib import contextmanager

import pytest
import torch

from kernels.audit.launch import GuardedLaunch
from kernels.cross_entropy import cross_entropy
from kernels.norm import norm
from kernels.rope import rope
from kernels.ssd import ssd, step
from kernels.swiglu import swiglu
from tests.kernels.cross_entropy_cases import inputs as cross_entropy_inputs
from tests.kernels.cross_entropy_cases import run
from tests.kernels.scan_cases import make_inputs
from tests.kernels.step_cases import step_inputs


def scan():
    ssd.ssd(**make_inputs(1, 20))


def one_step():
    step.ssd_step(**step_inputs(1, 2, 1, 16, 16))


def rotate():
    rope.apply_rope(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 4), torch.zeros(1, 4, 4))


def normalise():
    norm.rms_norm(torch.ones(3, 8), torch.ones(8), 1e-6)


def multiply():
    swiglu.swiglu(torch.ones(8), torch.ones(8))


def lose():
    run(*cross_entropy_inputs(7, 7), 7)


@pytest.mark.parametrize(
    ("module", "operation"),
    [(ssd, scan), (step, one_step), (rope, rotate), (norm, normalise), (swiglu, multiply),
     (cross_entropy, lose)],
)  # fmt: skip
def test_every_launch_is_on_the_tensors_device(module, operation, monkeypatch):
    inside: list[bool] = []
    launches: list[bool] = []
    stock_call = GuardedLaunch.__call__

    @contextmanager
    def launch_on(tensor):
        assert isinstance(tensor, torch.Tensor)
        inside.append(True)
        yield
        inside.pop()

    def call(self, *args, **kwargs):
        launches.append(bool(inside))
        return stock_call(self, *args, **kwargs)

    monkeypatch.setattr(module, "launch_on", launch_on)
    monkeypatch.setattr(GuardedLaunch, "__call__", call)
    operation()
    assert launches
    assert all(launches)
