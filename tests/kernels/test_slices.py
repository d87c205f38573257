"""Tensors side by side in one buffer: found where they are, and nowhere else."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.slices import empty_together, row_stride, shared_stride


def columns(
    tokens: tuple[int, int], shapes: list[tuple[int, ...]], rest: int = 0, before: int = 0
) -> list[Tensor]:
    """Adjacent columns of one buffer whose rows have more before and after them."""
    widths = [torch.Size(shape).numel() for shape in shapes]
    buffer = torch.randn(*tokens, before + sum(widths) + rest)
    parts = buffer[..., before : before + sum(widths)].split(widths, -1)
    return [part.view(*tokens, *shape) for part, shape in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize("tokens", [(1, 7), (2, 5), (6, 1)])
@pytest.mark.parametrize("rest", [0, 3])
@pytest.mark.parametrize("before", [0, 2])
def test_slices_get_slices(tokens: tuple[int, int], rest: int, before: int) -> None:
    shapes = [(3, 4), (1, 4), (), (5,)]
    given = columns(tokens, shapes, rest, before)
    stride = 12 + 4 + 1 + 5 + rest + before
    assert shared_stride(given) == stride
    found = empty_together(*given)
    assert [t.shape for t in found] == [t.shape for t in given]
    assert shared_stride(found) == stride
    for number, tensor in enumerate(found):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(found))


def test_what_is_not_side_by_side_is_contiguous() -> None:
    x, b, c = columns((2, 5), [(3, 4), (2, 4), (2, 4)])
    flat = torch.randn(400)
    cases = {
        "a copy": [x, b.clone(), c],
        "another order": [b, x, c],
        "one left out": [x, c],
        "one twice": [x, b, b],
        "one token less": [x[:, 1:], b[:, 1:], c[:, :4]],
        "one batch less": [x, b[:1], c],
        "transposed heads": [x.transpose(2, 3), b, c],
        "transposed tokens": [t.transpose(0, 1) for t in (x, b, c)],
        "another dtype": [x, b.view(torch.int32), c],
        "a row for each": list(torch.randn(3, 2, 5, 4).unbind(0)),
        "wider than a row": [
            flat.as_strided((2, 5, width), (140, 28, 1), start)
            for width, start in ((12, 0), (28, 12))
        ],
        "one token": columns((1, 1), [(3, 4), (2, 4)]),
        "expanded": [t[:, :1].expand(2, 5, -1, -1) for t in (x, b)],
    }
    for name, tensors in cases.items():
        assert shared_stride(tensors) == 0, name
        found = empty_together(*tensors)
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in tensors], name
        assert all(t.is_contiguous() for t in found), name
        assert len({t.untyped_storage().data_ptr() for t in found}) == len(found), name


def test_storages_without_memory_are_told_apart() -> None:
    one = torch.empty(4, 1, 6, device="meta").split([2, 4], -1)
    other = torch.empty(4, 1, 6, device="meta").split([2, 4], -1)
    assert shared_stride(one) == 6
    assert shared_stride([one[0], other[1]]) == 0


@pytest.mark.parametrize(
    ("tensor", "stride"),
    [
        (torch.empty(2, 5, 3, 4), 12),
        (torch.empty(2, 5, 20)[..., 2:14].unflatten(2, (3, 4)), 20),
        (torch.empty(7, 1, 20)[..., :12], 20),
        (torch.empty(1, 1, 20)[..., :12], 12),
        (torch.empty(2, 5), 1),
        (torch.empty(2, 5, 3, 4)[:, :4], None),
        (torch.empty(2, 5, 3, 4).transpose(2, 3), None),
        (torch.empty(5, 2, 3, 4).transpose(0, 1), None),
        (torch.empty(2, 5, 3, 8)[..., ::2], None),
        (torch.empty(1, 1, 3, 4).expand(2, 5, 3, 4), None),
        (torch.empty(40).as_strided((1, 5, 12), (0, 6, 1)), None),
    ],
)
def test_rows_of_tokens(tensor: Tensor, stride: int | None) -> None:
    assert row_stride(tensor) == stride


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_strides(data: Any) -> None:
    """What `row_stride` says is where every element is, whatever the tensor is a view of."""
    small = st.integers(1, 3)
    shape = data.draw(st.lists(small, min_size=3, max_size=4))
    strides = data.draw(st.lists(st.integers(0, 12), min_size=len(shape), max_size=len(shape)))
    tensor = torch.arange(200.0).as_strided(shape, strides, 3)
    stride = row_stride(tensor)
    if stride is not None:
        width = tensor[0, 0].numel()
        tokens = shape[0] * shape[1]
        rows = torch.arange(200.0).as_strided((tokens, width), (stride, 1), 3)
        assert torch.equal(rows, tensor.reshape(tokens, width))
        assert stride >= width
    elif tensor.is_contiguous():
        raise AssertionError("a contiguous tensor has rows")
