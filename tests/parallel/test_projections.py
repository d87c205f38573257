"""Projections of the same tokens are one matrix product each way, wherever their weights lie."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.parity import MODEL
from benchmarks.ranks import run_ranks
from parallel.projections import joined_columns, joined_rows

INPUTS = ("x_proj b_proj c_proj dt_proj", "q_proj k_proj v_proj", "gate_proj up_proj")


def groups(module: nn.Module) -> list[list[Tensor]]:
    """Weights of the linears that are one product, of every half of every layer."""
    found = []
    for part in module.modules():
        for names in INPUTS:
            linears = [getattr(part, name, None) for name in names.split()]
            if all(linears):
                found.append([linear.weight for linear in linears])
    return found


# -- where matrices lie ----------------------------------------------------------------------------


def pieces(data: Any, matrices: list[Tensor]) -> list[Tensor]:
    """The same numbers, each in a place of its own or where another's end is."""
    found = []
    for matrix in matrices:
        match data.draw(st.sampled_from(["as it is", "a copy", "transposed", "in a wider one"])):
            case "a copy":
                matrix = matrix.clone()
            case "transposed":
                matrix = matrix.t().contiguous().t()
            case "in a wider one":
                matrix = torch.cat((matrix, matrix), -1)[:, : matrix.shape[1]]
        found.append(matrix)
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_joined_wherever_they_lie(data: Any) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    flat = torch.randn(sum(sizes) + 1, 3)
    together = list(flat[1:].split(sizes))
    order = data.draw(st.permutations(together))
    weights = pieces(data, order)
    assert torch.equal(joined_rows(weights), torch.cat(weights))
    assert joined_rows(together).data_ptr() == together[0].data_ptr()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_columns_are_joined_wherever_they_lie(data: Any) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    tokens = data.draw(st.integers(1, 3))
    flat = torch.randn(tokens, 1, sum(sizes) + data.draw(st.integers(0, 3)))
    together = list(flat[..., : sum(sizes)].split(sizes, -1))
    order = data.draw(st.permutations(together))
    grads = [part.unsqueeze(1) for part in pieces(data, [part.squeeze(1) for part in order])]
    assert torch.equal(joined_columns(grads), torch.cat(grads, -1).squeeze(1))
    if tokens > 1:
        assert joined_columns(together).data_ptr() == flat.data_ptr()


# -- products --------------------------------------------------------------------------------------


def projected(parallel: dict[str, Any], joined_bytes: int) -> tuple[list[float], list[bool]]:
    """Errors of outputs and gradients beside products of their own, and what overlaps in memory.

    joined_bytes: the largest result that a CPU computes as one product.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from parallel import projections
    from parallel.layers import column_linear
    from parallel.projections import project
    from tests.parallel.test_model import build

    projections.JOINED_BYTES = joined_bytes
    stage, _ = build({}, parallel)
    config, generator = stage.config, torch.Generator().manual_seed(1)
    linears = [column_linear(32, size, config) for size in (48, 16, 2)]
    for linear in linears:
        nn.init.normal_(linear.weight)
    h = torch.randn(12, 1, 32, generator=generator).requires_grad_()
    outputs = project(h, linears, config)
    grads = [torch.randn(out.shape, generator=generator) for out in outputs]
    weights = [linear.weight for linear in linears]
    found = [*outputs, *torch.autograd.grad(outputs, [h, *weights], grads)]
    u = h.double()
    if config.sequence_parallel:
        u = gather_from_sequence_parallel_region(u)
    expected = [F.linear(u, weight.double()) for weight in weights]
    exact = torch.autograd.grad(expected, [h, *weights], [g.double() for g in grads])
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(exact[0], group=group)
    errors = [
        float((a.double() - b).norm() / b.norm())
        for a, b in zip(found, [*expected, *exact], strict=True)
    ]
    row = outputs[0].stride(0)
    in_one = [
        row == 16 * -(-sum(out.shape[-1] for out in outputs) // 16),
        outputs[1].data_ptr() == outputs[0].data_ptr() + 4 * outputs[0].shape[-1],
    ]
    return errors, in_one


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence": False}], ids=str)
def test_one_product_is_each_of_them(parallel: dict[str, Any]) -> None:
    for errors, in_one in run_ranks(parallel.get("tensor", 1), projected, parallel, 1 << 20):
        assert max(errors) < 1e-5, errors
        assert all(in_one)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence": False}], ids=str)
def test_large_products_on_a_cpu_are_apart(parallel: dict[str, Any]) -> None:
    for errors, in_one in run_ranks(parallel.get("tensor", 1), projected, parallel, 0):
        assert max(errors) < 1e-5, errors
        assert not any(in_one)


# -- after DeepSpeed -------------------------------------------------------------------------------


def weights_that_are_views(zero_stage: int, dtype: torch.dtype) -> list[bool]:
    """Of every half of every layer, whether its weights are one matrix; after a step."""
    from tests.parallel.test_update import built_zero

    zero = built_zero({"zero_stage": zero_stage}, dtype, MODEL)
    zero.step(1e-3)
    found = groups(zero.built.chunks[0])
    assert len(found) == 2 * MODEL["num_layers"]
    return [joined_rows(weights).data_ptr() == weights[0].data_ptr() for weights in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_lays_them_side_by_side(zero_stage: int, dtype: torch.dtype) -> None:
    for views in run_ranks(2, weights_that_are_views, zero_stage, dtype):
        assert all(views)


# -- counted ---------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def flatten(module: nn.Module) -> None:
    """Lay all parameters one after the other, as ZeRO 1 does."""
    parameters = list(module.parameters())
    flat = parameters[0].new_empty(sum(p.numel() for p in parameters))
    for parameter, part in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.data = part.view_as(parameter)


class AttentionOfNothing(torch.autograd.Function):
    """Attention without memory would be composed of operations that no device runs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q.new_empty(q.shape)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*(t.new_empty(t.shape) for t in ctx.saved_tensors), None)


def operations_of_a_layer(attends: bool) -> dict[str, int]:
    """Aten operations of a layer forward and backward, without memory."""
    import parallel.mixers
    from kernels.audit.compiling import TARGETS, compile_only
    from kernels.ssd.tables import ScanTables
    from parallel.config import ModelConfig
    from parallel.mixers import Positions
    from tests.parallel.test_model import build

    parallel.mixers.attention = AttentionOfNothing.apply
    fields = {
        "num_layers": 1, "attn_layer_period": 1, "attn_layer_offset": 0 if attends else 1,
        "head_dim": 16, "state_dim": 32, "ssd_groups": 4,
    }  # fmt: skip
    stage, _ = build(fields)
    stage = stage.bfloat16().to("meta")
    flatten(stage)
    model: ModelConfig = stage.model_config
    batch, length, meta = 2, 64, torch.device("meta")
    tables = [
        (torch.empty(batch, length, dim // 2, device=meta),) * 2
        for dim in (model.head_dim, model.state_dim)
    ]
    borders = torch.empty(batch + 1, dtype=torch.int32, device=meta)
    ids = torch.empty(batch, length, dtype=torch.int64, device=meta)
    rotation = torch.empty(batch, length, model.state_dim, device=meta, dtype=torch.float16)
    documents = torch.empty(batch * length, device=meta, dtype=torch.int32)
    scan = ScanTables(borders, *tables[1], documents, rotation)
    positions = Positions(batch, length, borders, borders, ids, *tables, scan, None)
    h = torch.empty(batch * length, 1, model.hidden_size, device=meta, dtype=torch.bfloat16)
    normed = torch.empty_like(h).requires_grad_()
    h.requires_grad_()
    layer = stage.model.layers["0"]
    with compile_only(TARGETS["sm_90"]) as launches, Operations() as operations:
        out = layer(h, normed, positions, layer.pre_sequence_layernorm)
        torch.autograd.grad(out, [h, normed, *layer.parameters()], [torch.empty_like(h)] * 2)
    assert launches, "kernels were not chosen"
    return dict(operations.names)


@pytest.mark.parametrize("attends", [True, False], ids=["attention", "ssd"])
def test_a_half_is_six_products_and_no_sum_or_copy(attends: bool) -> None:
    (counted,) = run_ranks(1, operations_of_a_layer, attends)
    assert counted["mm"] == 12, counted
    sums_and_copies = {"add", "add_", "addmm", "bmm", "clone", "contiguous", "copy_"}
    tables = {"cat", "arange", "bucketize", "index"}  # which the micro-batch has
    assert not counted.keys() & (sums_and_copies | tables), counted
