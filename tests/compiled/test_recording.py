"""The driver that names launches, and the library that stands in for CUDA's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.audit import compiling
from kernels.audit.compiling import TARGETS
from kernels.audit.recording import Recorded, distinct_bytes, record_only
from kernels.audit.stub_driver import NoCompilerError, build_stub
from kernels.norm.norm import rms_norm
from kernels.target import current_target
from tests.compiled.toys import META, Copied


def test_launches_are_named_forward_and_backward() -> None:
    before, stock = driver._active, JITFunction.run
    found: list[Recorded] = []
    x = torch.empty(1 << 30, device=META, requires_grad=True)
    with record_only(TARGETS["sm_80"], found.append):
        assert current_target() == TARGETS["sm_80"]
        y = Copied.apply(x)
        torch.autograd.grad(y, x, torch.empty_like(y))
    assert found == [Recorded("copy_kernel", 8 << 30)] * 2
    assert (driver._active, JITFunction.run) == (before, stock)


def test_operations_choose_triton() -> None:
    found: list[Recorded] = []
    h, weight = torch.empty(64, 32, device=META), torch.empty(32, device=META)
    with record_only(TARGETS["sm_90"], found.append):
        rms_norm(h, weight, 1e-5)
    # h is also given as h', which the norm alone does not write
    assert [launch.name for launch in found] == ["norm_forward_kernel"]
    assert found[0].bytes == 3 * h.nbytes + weight.nbytes


def test_the_target_is_found_once_for_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    stock = compiling._Driver.get_current_target

    def counted(self: compiling._Driver) -> Any:
        asked.append(self)
        return stock(self)

    monkeypatch.setattr(compiling._Driver, "get_current_target", counted)
    for name in ("sm_80", "sm_90", "sm_80"):
        with record_only(TARGETS[name], lambda launch: None):
            assert [current_target() for _ in range(3)] == [TARGETS[name]] * 3
    assert len(asked) == 3


def test_expanded_tensors_have_few_bytes() -> None:
    assert distinct_bytes(torch.empty(3, 1).expand(3, 1000)) == 12


def test_a_library_is_made_where_there_is_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_stub(tmp_path)
    assert (tmp_path / "libcuda.so").resolve() == tmp_path / "libcuda.so.1"
    monkeypatch.setenv("CC", "false")
    with pytest.raises(NoCompilerError, match="false cannot make a library"):
        build_stub(tmp_path)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompilerError, match="there is no C compiler"):
        build_stub(tmp_path)
