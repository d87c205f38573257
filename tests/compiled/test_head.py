"""What the output head launches and moves on a GPU: Triton's launches, and torch's operations on
tensors without memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.audit.compiling import TARGETS, Launch, compile_only
from kernels.cross_entropy import fused
from kernels.cross_entropy.sizes import rows_at_once
from parallel import loss
from parallel.sizes import GPU_BLOCK_TOKENS, head_block_tokens
from tests.compiled.toys import META

HIDDEN, VOCABULARY, VALID = 1024, 32768, 32700
PRODUCTS = {"mm", "addmm"}
FREE = {"t", "transpose", "slice", "detach", "view", "select", "unsqueeze", "expand"}  # views
ALLOCATES = {"empty", "empty_like", "new_empty"}


class Operations(TorchDispatchMode):
    """Those that a GPU would run: name, bytes that come in and go out, and dtype of what does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE | ALLOCATES:
            tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.seen.append((name, size, result.dtype))
        return result


class Group:
    """Of tensor-parallel ranks; this is the first."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


@pytest.fixture(params=[1, 4])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    group = Group(request.param)
    monkeypatch.setattr(loss.parallel_state, "get_tensor_model_parallel_group", lambda: group)
    gathers: list[Tensor] = []
    monkeypatch.setattr(
        torch.distributed, "all_gather_into_tensor", lambda out, part, group: gathers.append(out)
    )
    yield request.param
    assert all(out.shape == (request.param * 3, GPU_BLOCK_TOKENS) for out in gathers)


def run_head(tokens: int, rows: int) -> tuple[list[Launch], list[tuple[str, int, torch.dtype]]]:
    h = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=META).requires_grad_()
    weight = torch.empty(rows, HIDDEN, dtype=torch.bfloat16, device=META).requires_grad_()
    labels = torch.empty(tokens, dtype=torch.int64, device=META)
    mask, scale = torch.empty(tokens, device=META), torch.empty((), device=META)
    with compile_only(TARGETS["sm_90"]) as launches, Operations() as operations:
        total, _ = loss.head_loss(h, weight, labels, mask, VALID)
        torch.autograd.grad(total, (h, weight), scale)
    return launches, operations.seen


def test_a_block_is_few_launches_and_moves_few_bytes(ranks: int) -> None:
    blocks, rows = 4, VOCABULARY // ranks
    tokens = blocks * GPU_BLOCK_TOKENS
    launches, operations = run_head(tokens, rows)
    kernels = ["statistics_kernel"] * (ranks > 1) + ["cross_entropy_kernel"]
    assert [launch.kernel.name for launch in launches] == blocks * kernels
    assert {launch.grid for launch in launches} == {(GPU_BLOCK_TOKENS, 1, 1)}
    products = [operation for operation in operations if operation[0] in PRODUCTS]
    assert len(products) == 3 * blocks
    gathers = blocks * (ranks > 1)
    # the rows' gradient rounded, the sum of the losses, and both gradients scaled
    others = [operation for operation in operations if operation[0] not in PRODUCTS]
    assert [name for name, _, _ in others] == ["_to_copy", "sum", "mul_", "mul_"]
    assert len(launches) + len(operations) + gathers <= 8 * blocks
    moved = blocks * sum(fused.traffic(GPU_BLOCK_TOKENS, rows, 2, ranks))
    assert moved + sum(size for _, size, _ in others) <= 8 * tokens * rows


def test_one_block_alone_is_eight_launches() -> None:
    group = Group(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.parallel_state, "get_tensor_model_parallel_group", lambda: group)
        launches, operations = run_head(GPU_BLOCK_TOKENS, VOCABULARY)
    assert len(launches) + len(operations) == 8


def test_weight_gradients_are_summed_in_float32_as_they_are_computed(ranks: int) -> None:
    _, operations = run_head(3 * GPU_BLOCK_TOKENS, VOCABULARY // ranks)
    sums = [dtype for name, _, dtype in operations if name in PRODUCTS]
    assert sums == 3 * [torch.bfloat16, torch.bfloat16, torch.float32]
    assert [name for name, _, _ in operations].count("addmm") == 2
    assert not any(name == "add_" for name, _, _ in operations)


def test_blocks_of_a_gpu_are_tall_and_fallbacks_are_bounded() -> None:
    assert head_block_tokens(262_144, on_gpu=True) == 8192
    assert head_block_tokens(262_144, on_gpu=False) == 1024
    assert 4 * 262_144 * rows_at_once(262_144, on_cpu=False) <= 1 << 28
