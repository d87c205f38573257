"""Operations that torch.compile takes as they are, in PyTorch's implementation."""

from collections.abc import Iterator

import pytest
import torch

from kernels.ssd.chunked import _forward
from tests.kernels.compiled_cases import CASES, assert_compiles, assert_registered
from tests.kernels.scan_cases import make_inputs


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_compiled_whole_it_is_the_same(name, dtype):
    assert_compiles(name, dtype)


def test_operators_are_registered_as_pytorch_wants_them():
    assert_registered(triton=False)


def test_the_scan_is_registered_as_pytorch_wants_it():
    i = make_inputs(1, 37, groups=2, documents=[5])
    i = {n: t.requires_grad_(n not in ("cos", "sin", "cu_seqlens")) for n, t in i.items()}
    given = [i[n] for n in ("x", "dt", "A", "B", "C", "cos", "sin", "dt_bias", "cu_seqlens")]
    torch.library.opcheck(_forward, (*given, i["initial_state"], i["D"], 16, True))
