"""Triton's kernels as operators that torch.compile takes as they are."""

import pytest
import torch

from kernels import dispatch
from kernels.ssd.operator import fused_scan_operator, tile_numbers
from kernels.ssd.tables import scan_tables
from tests.kernels.compiled_cases import CASES, assert_compiles, assert_registered
from tests.kernels.scan_cases import make_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_compiled_whole_it_is_the_same(name, dtype, monkeypatch):
    ran = {}
    monkeypatch.setattr(dispatch, "chosen", ran)
    assert_compiles(name, dtype)
    assert {choice for choices in ran.values() for choice in choices} == {"triton"}


def test_operators_are_registered_as_pytorch_wants_them():
    assert_registered(triton=True)


def test_the_scan_is_registered_as_pytorch_wants_it():
    i = make_inputs(1, 37, groups=2, documents=[5])
    i = {n: t.requires_grad_(n not in ("cos", "sin", "cu_seqlens")) for n, t in i.items()}
    tables = scan_tables(i["cu_seqlens"], (i["cos"], i["sin"]), 37, torch.float32)
    numbers = list(tile_numbers(torch.float32, 16, 16, 16))
    given = [i[n] for n in ("x", "dt", "A", "B", "C")]
    given += [tables.rotation, i["dt_bias"], tables.documents, i["initial_state"], i["D"]]
    torch.library.opcheck(fused_scan_operator, (*given, numbers, False, True))
