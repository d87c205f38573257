"""The Triton rotation against its float64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.audit.traffic import count_traffic
from kernels.rope import fused
from kernels.rope.naive import apply_rope_naive
from kernels.rope.rope import apply_rope, rotate_qk, rotate_qkv
from kernels.slices import shared_stride
from kernels.target import INTERPRETED
from tests.kernels.operation_cases import (
    DTYPES,
    assert_matches,
    assert_repeatable,
    outputs_and_gradients,
    side_by_side,
)
from tests.kernels.test_rope import queries_and_keys, rotations, tables

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize(
    "size", [(2, 9, 4, 2, 16), (1, 1, 1, 1, 2), (2, 37, 3, 1, 128), (1, 20, 2, 2, 80)], ids=str
)
def test_matches_naive(size, dtype):
    """Also a dimension that is no power of two, and tokens that do not fill a tile."""
    assert_matches(*rotations(size[0], size[1], size[4]), queries_and_keys(*size, dtype=dtype))


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 40), group=st.integers(1, 4),
    k_heads=st.integers(1, 3), half=st.integers(1, 40),
)  # fmt: skip
def test_any_shape(batch, length, group, k_heads, half):
    size = (batch, length, group * k_heads, k_heads, 2 * half)
    assert_matches(*rotations(batch, length, 2 * half), queries_and_keys(*size))


@pytest.mark.parametrize("heads_each", [1, 2, 3, 4, 6])
def test_heads_shared_among_programs(heads_each, monkeypatch):
    """Shares that end inside q, between q and k, and inside k."""
    monkeypatch.setattr(fused, "heads_per_program", lambda *_: (1, heads_each))
    assert_matches(*rotations(1, 5, 16), queries_and_keys(1, 5, 4, 2, 16))


@dtypes
def test_views_are_read_where_they_lie(dtype):
    q, k = queries_and_keys(2, 9, 4, 2, 16, dtype=dtype)
    packed = torch.cat((q, k), dim=2)
    assert_matches(*rotations(2, 9, 16), packed.split((4, 2), dim=2))
    time_first = packed.transpose(0, 1)
    assert_matches(*rotations(9, 2, 16), time_first.split((4, 2), dim=2))


def test_in_place():
    cos, sin = tables(2, 9, 16)
    q, k = queries_and_keys(2, 9, 4, 2, 16, dtype=torch.bfloat16)
    expected = rotate_qk(q, k, cos, sin)
    packed = torch.cat((q, k), dim=2)
    rotate_qk(*packed.split((4, 2), dim=2), cos, sin, inplace=True)
    assert torch.equal(packed, torch.cat(expected, dim=2))


def test_one_tensor():
    cos, sin = tables(2, 9, 16)
    q, _ = queries_and_keys(2, 9, 4, 2, 16)
    assert_matches(lambda t: apply_rope(t, cos, sin), lambda t: apply_rope_naive(t, cos, sin), [q])


def test_repeatable():
    assert_repeatable(rotations(2, 9, 16)[0], queries_and_keys(2, 9, 4, 2, 16))


@dtypes
def test_columns_of_one_buffer(dtype):
    """Gradients of q, k and v lie in one buffer, bit for bit those of contiguous ones."""
    q, k = queries_and_keys(2, 9, 4, 2, 16, dtype=dtype)
    columns = side_by_side((q, k, k + 1), rest=3)
    cos, sin = tables(2, 9, 16)
    found, expected = (
        outputs_and_gradients(lambda *t: rotate_qkv(*t, cos, sin), given)
        for given in (columns, (q, k, k + 1))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert shared_stride(found[3:]) == columns[0].stride(1)


@pytest.mark.parametrize("heads_each", [1, 3, 5, 8])
def test_values_are_shared_among_programs_too(heads_each, monkeypatch):
    """Shares that end inside q, k and v: the gradient of v is the given one, in one buffer."""
    monkeypatch.setattr(fused, "heads_per_program", lambda *_: (1, heads_each))
    q, k = queries_and_keys(1, 5, 4, 2, 16)
    cos, sin = tables(1, 5, 16)

    def oracle(q, k, v):
        return *(apply_rope_naive(t, cos, sin) for t in (q, k)), v

    columns = side_by_side((q, k, k + 1), rest=3)
    assert_matches(lambda *t: rotate_qkv(*t, cos, sin), oracle, columns)


def test_all_gradients_are_one_launch():
    q, k = queries_and_keys(2, 9, 4, 2, 16)
    cos, sin = tables(2, 9, 16)
    with count_traffic() as traffic:
        outputs_and_gradients(
            lambda *t: rotate_qkv(*t, cos, sin), side_by_side((q, k, k + 1), rest=3)
        )
    (kernel,) = traffic.values()
    passes = [fused.traffic(18, heads, 16, 4, INTERPRETED.num_sms) for heads in (6, 8)]
    assert kernel.launches == 2
    assert (kernel.loaded, kernel.stored) == tuple(map(sum, zip(*passes, strict=True)))
