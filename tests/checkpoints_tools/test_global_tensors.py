"""Flat ranges of local tensors as boxes of global ones: nothing lost, nothing twice."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_tools.global_tensors import boxes_of_range, global_parts
from parallel.params import ParamInfo, RowRange

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_cover_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = prod(shape)
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    index = torch.arange(numel).view(shape)
    found: list[int] = []
    for offsets, sizes in boxes_of_range(start, end, shape):
        window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        found += index[window].flatten().tolist()
    assert found == list(range(start, end))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.sampled_from([0, 1]), st.data())
def test_fragments_of_all_ranks_rebuild_the_tensor(
    tensor: int, rows: int, columns: int, dim: int, data: st.DataObject
) -> None:
    """Tensor-parallel parts, each cut at random into data-parallel flat fragments."""
    local_shape = (rows, columns)
    shape = (rows * tensor, columns) if dim == 0 else (rows, columns * tensor)
    if dim == 0:  # vocabulary padding: the last rows belong to nobody
        shape = (data.draw(st.integers(1, rows * tensor)), columns)
    whole, rebuilt = torch.arange(1.0, prod(shape) + 1).view(shape), torch.zeros(shape)
    for rank in range(tensor):
        size = local_shape[dim]
        valid = max(0, min(size, shape[dim] - rank * size))
        info = ParamInfo(
            "w", shape, local_shape, dim, (RowRange(0, rank * size, valid),), True, False
        )
        local = torch.full(local_shape, -1.0)
        local.narrow(dim, 0, valid).copy_(whole.narrow(dim, min(rank * size, shape[dim]), valid))
        cut = data.draw(st.integers(0, rows * columns))
        for start, end in ((0, cut), (cut, rows * columns)):
            for part in global_parts(info, start, local.flatten()[start:end]):
                window = tuple(
                    slice(o, o + s) for o, s in zip(part.offsets, part.data.shape, strict=True)
                )
                assert (rebuilt[window] == 0).all()
                rebuilt[window] = part.data
    assert torch.equal(rebuilt, whole)


@given(
    st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 2),
    st.data(),
)  # fmt: skip
def test_parts_of_several_ranges_go_to_their_places(
    tensor: int, kinds: list[int], width: int, data: st.DataObject
) -> None:
    """As of a convolution: of each kind of channels a rank has a share; fragments cut at random."""
    shape, local_shape = (sum(kinds) * tensor, width), (sum(kinds), width)
    whole, rebuilt = torch.arange(1.0, prod(shape) + 1).view(shape), torch.zeros(shape)
    for rank in range(tensor):
        ranges, held, local, start = [], [], 0, 0
        for share in kinds:
            ranges.append(RowRange(local, start + rank * share, share))
            held.append(whole[start + rank * share :][:share])
            local, start = local + share, start + tensor * share
        info = ParamInfo("w", shape, local_shape, 0, tuple(ranges), tensor > 1, False)
        flat = torch.cat(held).flatten()
        cut = data.draw(st.integers(0, flat.numel()))
        for begin, end in ((0, cut), (cut, flat.numel())):
            for part in global_parts(info, begin, flat[begin:end]):
                window = tuple(
                    slice(o, o + s) for o, s in zip(part.offsets, part.data.shape, strict=True)
                )
                assert (rebuilt[window] == 0).all()
                rebuilt[window] = part.data
    assert torch.equal(rebuilt, whole)
