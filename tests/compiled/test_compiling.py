"""The compile-only driver: real launch code on meta tensors, and nothing left behind."""

import os
import subprocess
import sys

import pytest
import torch
from triton.runtime.driver import driver

from kernels.audit.compiling import TARGETS, available_targets, compile_only
from kernels.target import Target, current_target
from tests.compiled.toys import BLOCK, META, Copied, copied


def test_forward_and_backward_are_listed_without_memory() -> None:
    shape = (8, 4096, 16, 128, 1024)  # 64 GiB in float32
    x = torch.empty(shape, device=META, requires_grad=True)
    with compile_only(TARGETS["sm_90"]) as launches:
        y = Copied.apply(x)
        torch.autograd.grad(y, x, torch.empty_like(y))
    forward, backward = launches
    assert forward.kernel.name == backward.kernel.name == "copy_kernel"
    assert forward.grid == (x.numel() // BLOCK, 1, 1)
    assert forward.arguments["size"] == x.numel()
    assert forward.arguments["source"].shape == shape
    assert forward.kernel is backward.kernel, "the same specialisation is compiled once"


@pytest.mark.parametrize("name", available_targets())
def test_the_target_is_pretended_and_gone_afterwards(name: str) -> None:
    before = driver._active
    with compile_only(TARGETS[name]) as launches:
        assert current_target() == TARGETS[name]
        assert os.environ["TRANSXSSM_KERNELS"] == "triton"
        copied(torch.empty(4096, device=META))
    assert launches[0].kernel.metadata.target.arch == TARGETS[name].arch
    assert driver._active is before
    assert "TRANSXSSM_KERNELS" not in os.environ


def test_an_exception_restores_the_driver() -> None:
    before = driver._active
    with pytest.raises(ZeroDivisionError), compile_only(TARGETS["sm_80"]):
        raise ZeroDivisionError
    assert driver._active is before


def test_an_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(RuntimeError, match="no backend for metal:m1"),
        compile_only(Target("metal", "m1", 8)),
    ):
        pass


def test_interpreting_is_refused() -> None:
    program = (
        "from kernels.audit.compiling import TARGETS, compile_only\n"
        "with compile_only(TARGETS['sm_90']): pass"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert "RuntimeError: TRITON_INTERPRET is set" in run.stderr
