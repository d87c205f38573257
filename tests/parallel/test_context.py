"""Context parallelism: ranks with parts of rows compute what one process does with whole rows."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.ranks import run_ranks
from parallel.config import ParallelConfig

# Rows of 24 tokens on 4 ranks of 6: documents over one, two and all parts, borders at every place
# of a part, among them its first and its last token, and documents of one token.
ROWS = {
    "one-document": [[24], [24]],
    "at-parts": [[6, 12, 6], [18, 6]],
    "around-parts": [[5, 2, 10, 1, 6], [1, 22, 1]],
    "short": [[1, 1, 3, 2, 4, 1, 5, 7], [7, 1, 1, 15]],
}
Results = dict[str, Tensor]


def borders(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """position_ids [B, L] and cu_seqlens."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    sizes = torch.tensor([0, *(n for row in rows for n in row)])
    return positions, sizes.cumsum(0).int()


def start_group(size: int) -> tuple[int, slice]:
    """This rank's place in the group, and its tokens of a row of 24."""
    from parallel.compat import prepare_host
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment

    launch = launch_from_environment()
    init_distributed(launch, prepare_host())
    init_groups(ParallelConfig(context=size))
    return launch.rank, slice(launch.rank * 24 // size, (launch.rank + 1) * 24 // size)


def scan_inputs(decay: float) -> dict[str, Tensor]:
    """Two rows, 4 heads in 2 groups, P 8, N 4; gradients wanted of all but the table."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    angles = normal(2, 24, 2)
    inputs = {
        "x": normal(2, 24, 4, 8), "dt": normal(2, 24, 4), "A": -decay * (1 + torch.arange(4.0)),
        "B": normal(2, 24, 2, 4), "C": normal(2, 24, 2, 4), "dt_bias": normal(4),
    }  # fmt: skip
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    return tensors | {"cos": angles.cos(), "sin": angles.sin()}


def attention_inputs(heads: int, kv_heads: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {
        name: torch.randn(2, 24, count, 8, generator=generator).requires_grad_()
        for name, count in sizes.items()
    }


def with_gradients(y: Tensor, whole: dict[str, Tensor], part: slice) -> Results:
    """y and gradients of every input under a fixed gradient of whole rows' outputs."""
    dy = torch.randn(2, 24, *y.shape[2:], generator=torch.Generator().manual_seed(1))
    wanted = {name: tensor for name, tensor in whole.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy[:, part])
    return {"y": y.detach()} | {f"d_{n}": g for n, g in zip(wanted, gradients, strict=True)}


def scan_rows(rows: list[list[int]], decay: float) -> Results:
    from kernels.ssd.ssd import ssd

    inputs = scan_inputs(decay)
    y = ssd(**inputs, cu_seqlens=borders(rows)[1])
    assert isinstance(y, Tensor)
    return with_gradients(y, inputs, slice(0, 24))


def scan_parts(size: int, rows: list[list[int]], decay: float) -> Results:
    from kernels.ssd.ssd import ssd
    from parallel.context import add_earlier_ranks, local_borders

    _, part = start_group(size)
    whole = scan_inputs(decay)
    mine = {
        name: tensor[:, part].contiguous() if tensor.ndim > 1 else tensor
        for name, tensor in whole.items()
    }
    positions, cu_seqlens = borders(rows)
    y, final = ssd(
        **mine, cu_seqlens=local_borders(cu_seqlens, 2, 24, part), output_final_state=True
    )
    rest = {name: mine[name] for name in ("dt", "A", "C", "cos", "sin", "dt_bias")}
    y = add_earlier_ranks(y, final, **rest, position_ids=positions[:, part])
    return with_gradients(y, whole, part)


def attend_rows(rows: list[list[int]], heads: int, kv_heads: int) -> Results:
    from kernels.attention import attention

    inputs = attention_inputs(heads, kv_heads)
    y = attention(*inputs.values(), borders(rows)[1])
    return with_gradients(y, inputs, slice(0, 24))


def attend_parts(size: int, rows: list[list[int]], heads: int, kv_heads: int) -> Results:
    from parallel import ring
    from parallel.context import context_attention

    ring.TILE = 4  # in this rank's process
    _, part = start_group(size)
    whole = attention_inputs(heads, kv_heads)
    positions, cu_seqlens = borders(rows)
    mine = (tensor[:, part] for tensor in whole.values())
    y = context_attention(*mine, cu_seqlens, positions[:, part])
    return with_gradients(y, whole, part)


def joined(parts: list[Results]) -> Results:
    """Outputs end to end, gradients summed: each rank's are 0 outside its part of a token's."""
    return {
        name: torch.cat([part[name] for part in parts], 1)
        if name == "y"
        else sum((part[name] for part in parts), torch.zeros(()))
        for name in parts[0]
    }


def assert_same(found: Results, expected: Results) -> None:
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 2e-6, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_scan_passes_states(rows: list[list[int]]) -> None:
    for size, decay in [(4, 0.02), (3, 1.0), (2, 0.2)]:
        found = joined(run_ranks(size, scan_parts, size, rows, decay))
        assert_same(found, scan_rows(rows, decay))


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_attention_exchanges_heads(kv_heads: int) -> None:
    rows = ROWS["around-parts"]
    found = joined(run_ranks(4, attend_parts, 4, rows, 8, kv_heads))
    assert_same(found, attend_rows(rows, 8, kv_heads))


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"), [(4, 6, 3), (4, 2, 1), (3, 4, 4), (4, 12, 6)], ids=str
)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_attention_goes_round_a_ring(
    rows: list[list[int]], size: int, heads: int, kv_heads: int
) -> None:
    found = joined(run_ranks(size, attend_parts, size, rows, heads, kv_heads))
    assert_same(found, attend_rows(rows, heads, kv_heads))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_borders_of_parts(data: Any) -> None:
    from parallel.context import local_borders

    size, count = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    length, rows = size * count, data.draw(st.integers(1, 3))
    cuts = data.draw(st.sets(st.integers(1, rows * length - 1))) if rows * length > 1 else set()
    cuts |= {row * length for row in range(rows + 1)}
    whole = torch.tensor(sorted(cuts), dtype=torch.int32)
    document = torch.bucketize(torch.arange(rows * length), whole[1:], right=True)
    for rank in range(count):
        part = slice(rank * size, (rank + 1) * size)
        found = local_borders(whole, rows, length, part)
        assert found.dtype == torch.int32
        local = torch.bucketize(torch.arange(rows * size), found[1:], right=True)
        ids = document.view(rows, length)[:, part].flatten()
        assert torch.equal(ids[1:] != ids[:-1], local[1:] != local[:-1])
        assert found[0] == 0
        assert found[-1] == rows * size


def leak(size: int, change: bool) -> Results:
    """This rank's outputs of whole layers, the first document's inputs changed or not."""
    from tests.parallel.test_model import build, packed

    stage, _ = build({}, {"context": size})
    rank = start_group(size)[0]
    positions, cu_seqlens = packed([21, 43])
    tokens = torch.arange(64)[None] * 3
    if change:
        tokens[:, :21] += 7
    from parallel.context import local_borders

    part = slice(rank * 64 // size, (rank + 1) * 64 // size)
    with torch.no_grad():
        local = local_borders(cu_seqlens, 1, 64, part)
        hidden = stage.hidden(tokens[:, part], positions[:, part], cu_seqlens, local)
    return {"y": hidden.transpose(0, 1)}


def test_documents_do_not_leak_between_ranks() -> None:
    first, second = (joined(run_ranks(4, leak, 4, change))["y"] for change in (False, True))
    assert torch.equal(first[:, 21:], second[:, 21:])
    assert not torch.equal(first[:, :21], second[:, :21])
