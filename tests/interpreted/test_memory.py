"""Accesses that a GPU must not make, or whose order it does not promise, are errors."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.audit.memory import MemoryFault


@triton.jit
def _copy(X, OUT, x_offset, out_offset, active, N: tl.constexpr):
    lane = tl.arange(0, N)
    x = tl.load(X + x_offset + lane, mask=lane < active)
    tl.store(OUT + out_offset + lane, x, mask=lane < active)


def test_masked_lanes_may_point_anywhere():
    x, out = torch.arange(10.0), torch.full((10,), -1.0)
    _copy[(1,)](x, out, 0, 0, 10, 16)
    assert torch.equal(out, x)
    _copy[(1,)](x, out, 1 << 30, -(1 << 30), 0, 16)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("x_offset", "out_offset", "says"),
    [
        (1, 0, "load of {k} bytes at byte {n} of argument 'X', which spans {n} bytes"),
        (-1, 0, "load of {k} bytes at byte -{k} of argument 'X'"),
        (1 << 30, 0, r"load of {k} bytes at byte \d+ of argument 'OUT'"),
        (-(1 << 30), 0, r"load of {k} bytes at byte -\d+ of argument 'X'"),
        (0, 1, "store of {k} bytes at byte {n} of argument 'OUT'"),
        (0, -1, "store of {k} bytes at byte -{k} of argument 'OUT'"),
    ],
)
def test_one_element_out_of_bounds(dtype, x_offset, out_offset, says):
    k = dtype.itemsize
    x, out = torch.zeros(16, dtype=dtype), torch.ones(16, dtype=dtype)
    says = rf"^_copy, program \(0, 0, 0\): {says.format(k=k, n=16 * k)}.*: out of bounds"
    with pytest.raises(MemoryFault, match=says):
        _copy[(1,)](x, out, x_offset, out_offset, 16, 16)
    assert out.eq(1).all()  # a launch that failed changes nothing


def test_the_storage_around_a_view_is_out_of_bounds():
    storage, out = torch.zeros(64), torch.empty(16)
    with pytest.raises(MemoryFault, match=r"byte 64 of argument 'X'.*: out of bounds"):
        _copy[(1,)](storage[16:32], out, 1, 0, 16, 16)
    with pytest.raises(MemoryFault, match=r"byte 4 of argument 'X'.*: out of bounds"):
        _copy[(1,)](storage[::4], out, 0, 0, 16, 16)


@triton.jit
def _shifted_by_bytes(X, OUT, offset, N: tl.constexpr):
    lane = tl.arange(0, N)
    shifted = (X.to(tl.pointer_type(tl.int8)) + offset).to(tl.pointer_type(tl.float32))
    tl.store(OUT + lane, tl.load(shifted + lane))


def test_an_address_must_be_a_multiple_of_the_element_size():
    x, out = torch.arange(17.0), torch.empty(16)
    _shifted_by_bytes[(1,)](x, out, 4, 16)
    assert torch.equal(out, x[1:])
    with pytest.raises(MemoryFault, match=r"byte 1 of argument 'X'.*: not a multiple of"):
        _shifted_by_bytes[(1,)](x, out, 1, 16)


@triton.jit
def _load_some(X, OUT, active, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(OUT + lane, tl.load(X + lane, mask=lane < active))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_a_masked_load_leaves_undefined_is_nan(dtype):
    x, out = torch.ones(16, dtype=dtype), torch.empty(16, dtype=dtype)
    _load_some[(1,)](x, out, 5, 16)
    assert torch.equal(out.isnan(), torch.arange(16) >= 5)


@triton.jit
def _copy_rows(X, OUT, x_row, x_column, out_row, out_column, N: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, N)
    x = tl.load(X + row * x_row + lane * x_column)
    tl.store(OUT + row * out_row + lane * out_column, x)


@triton.jit
def _load_or(X, OUT, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(OUT + lane, tl.load(X + lane, lane < n, other=OTHER))


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("other", [0.0, 2.5])
def test_a_masked_load_gives_other(other, block):
    out = torch.full((block,), 7.0)
    _load_or[(1,)](torch.ones(block), out, 0, OTHER=other, BLOCK=block)
    assert out.tolist() == [other] * block


def test_views_keep_their_strides_and_their_surroundings():
    x = torch.randn(16, 4)
    base = torch.full((6, 40), 7.0)
    out = base[1:5, 3:35:2]
    _copy_rows[(4,)](x.T, out, *x.T.stride(), *out.stride(), 16)
    assert torch.equal(out, x.T)
    base[1:5, 3:35:2] = 7
    assert base.eq(7).all()
    expanded = torch.randn(16).expand(4, 16)
    _copy_rows[(4,)](expanded, out, *expanded.stride(), *out.stride(), 16)
    assert torch.equal(out, expanded)
    _copy_rows[(0,)](x[:0], base[:0], 0, 0, 0, 0, 16)  # nothing to point at, nothing touched


@triton.jit
def _store_then_load(X, Y, OUT, BARRIER: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(X + lane, lane)
    if BARRIER:
        tl.debug_barrier()
    tl.store(OUT + lane, tl.load(Y + lane))


def test_arguments_that_share_storage_share_it_in_the_kernel():
    storage, out = torch.zeros(24, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    _store_then_load[(1,)](storage[:16], storage[8:], out, True, 16)
    assert out.tolist() == [8, 9, 10, 11, 12, 13, 14, 15] + [0] * 8
    assert storage.tolist() == [*range(16)] + [0] * 8


def test_memory_is_shared_by_address_not_by_storage():
    array, out = np.zeros(24, np.int32), torch.empty(16, dtype=torch.int32)
    _store_then_load[(1,)](torch.from_numpy(array[:16]), torch.from_numpy(array[8:]), out, True, 16)
    assert out.tolist() == [8, 9, 10, 11, 12, 13, 14, 15] + [0] * 8


def test_reading_back_without_a_barrier_is_a_race_within_the_program():
    storage, out = torch.zeros(24, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    says = r"load of 4 bytes at byte \d+ of argument '[XY]'.*: .* tl\.debug_barrier"
    with pytest.raises(MemoryFault, match=says):
        _store_then_load[(1,)](storage[:16], storage[8:], out, False, 16)


@triton.jit
def _fold(X, OUT, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(OUT + lane // 2, tl.load(X + lane))


def test_lanes_of_a_store_may_share_an_element_only_if_they_agree():
    x, out = torch.tensor([1.0, 1.0, float("nan"), float("nan")]), torch.zeros(2)
    _fold[(1,)](x, out, 4)
    assert out[0] == 1
    assert out[1].isnan()
    with pytest.raises(MemoryFault, match=r"store .* argument 'OUT'.*: a race, two lanes"):
        _fold[(1,)](torch.arange(4.0), out, 4)


@triton.jit
def _touch(X, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Program 0 does FIRST, the others SECOND to the same element."""
    if tl.program_id(0) == 0:
        _do(X, FIRST)
    else:
        _do(X, SECOND)


@triton.jit
def _do(X, WHAT: tl.constexpr):
    if WHAT == "load":
        tl.device_assert(tl.load(X) < 100)
    elif WHAT == "store":
        tl.store(X, 1)
    elif WHAT == "add":
        tl.atomic_add(X, 1)
    elif WHAT == "swap":
        tl.atomic_cas(X, 0, 1)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("store", "store", "store .* a race, another program stored it"),
        ("store", "load", "load .* a race, another program stored it"),
        ("load", "store", "store .* a race, another program loaded it"),
        ("add", "load", "load .* a race, another program atomically updated it"),
        ("swap", "store", "store .* a race, another program atomically updated it"),
        ("load", "add", "atomic .* a race, another program loaded it"),
        ("store", "swap", "atomic .* a race, another program stored it"),
    ],
)
def test_two_programs_race_for_an_element(first, second, says):
    x = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(MemoryFault, match=rf"^_touch, program \(1, 0, 0\): {says}"):
        _touch[(2,)](x, first, second)
    _touch[(1,)](x, first, second)  # one program alone does not
    assert x.tolist() == [0 if first == "load" else 1, 0, 0, 0]


@pytest.mark.parametrize(("what", "after"), [("load", 0), ("add", 3), ("swap", 1)])
def test_programs_may_share_what_they_only_load_or_update_atomically(what, after):
    x = torch.zeros(4, dtype=torch.int32)
    _touch[(3,)](x, what, what)
    assert x.tolist() == [after, 0, 0, 0]


@triton.jit
def _atomic_at(X, offset):
    tl.atomic_add(X + offset, 1)


def test_atomics_are_checked_too():
    with pytest.raises(
        MemoryFault, match=r"atomic of 4 bytes at byte 16 of argument 'X'.*: out of"
    ):
        _atomic_at[(1,)](torch.zeros(4), 4)
    with pytest.raises(NotImplementedError, match="atomics on bfloat16"):
        _atomic_at[(1,)](torch.zeros(4, dtype=torch.bfloat16), 0)


@triton.jit
def _copy_tiles(X, OUT, rows, columns, M: tl.constexpr, N: tl.constexpr):
    out = tl.make_tensor_descriptor(OUT, [rows, columns], [columns, 1], [M, N])
    at = [tl.program_id(0) * M, tl.program_id(1) * N]
    out.store(at, X.load(at))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_descriptors(dtype):
    x = torch.randn(21, 40).to(dtype)
    out = torch.empty_like(x)
    _copy_tiles[(2, 3)](TensorDescriptor.from_tensor(x, [16, 16]), out, 21, 40, 16, 16)
    assert torch.equal(out, x)
    with pytest.raises(MemoryFault, match=r"store .* argument 'OUT'.*: out of bounds"):
        _copy_tiles[(2, 3)](TensorDescriptor.from_tensor(x, [16, 16]), out, 22, 40, 16, 16)


def test_tensors_elsewhere_are_refused():
    x = torch.empty(16, device="meta")
    with pytest.raises(ValueError, match="_copy: argument 'X' is on meta"):
        _copy[(1,)](x, x, 0, 0, 16, 16)
