"""Projections: several of the same tokens into heads, and one back, one matrix product each way.

    [x₁ | x₂ | ...] = u Wᵀ        W = [W₁; W₂; ...]        u: tokens of the whole tensor group
    dW = Gᵀ u,  du = G W          G = [dx₁ | dx₂ | ...]

The first kind is column-parallel, the second (one W, summed over the group) row-parallel. Where
weights have float32 sums of their gradients (`parallel.main_grads`), dW is added to them by the
product itself, and autograd gets no gradient.

Parameters and their names stay apart. After DeepSpeed's ZeRO 1 and 2 have flattened them, the Wᵢ
lie one after the other in memory, and W is a view; elsewhere they are concatenated. The xᵢ are
column slices of one buffer, and kernels write the dxᵢ into another like it (`kernels.slices`),
which then is G.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from kernels.paths import COLUMN_SLICES, is_off
from kernels.slices import ROW_ELEMENTS, shared_stride
from parallel.main_grads import main_grad, mark
from parallel.products import add_product

JOINED_BYTES = 1 << 23  # largest result that a CPU computes as one product


def project(
    h: Tensor, linears: Sequence[ColumnParallelLinear], config: ModelParallelConfig
) -> tuple[Tensor, ...]:
    """Project h [T or T/tp, 1, hidden] by every linear: [T, 1, out / tp] each.

    They lie in one buffer, unless a CPU computes them apart (`_parts`).
    """
    split = config.sequence_parallel
    weights = (linear.weight for linear in linears)
    if is_dynamo_compiling():
        return _project_compiled(h, tuple(weights))
    projected: tuple[Tensor, ...] = _JoinedLinears.apply(split, h, *weights)
    return projected


class RowLinear(RowParallelLinear):
    """x Wᵀ, W [out, in] split over `in`, summed over the tensor-parallel group.

    Under sequence parallelism each rank gets its own tokens of the sum.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[T, 1, in / tp] → [T or T/tp, 1, out], and no bias."""
        if is_dynamo_compiling():
            return F.linear(x, self.weight), None
        product: Tensor = _Linear.apply(x, self.weight)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(product), None
        if get_tensor_model_parallel_group().size() > 1:
            return reduce_from_tensor_model_parallel_region(product), None
        return product, None


class _Linear(torch.autograd.Function):
    """x Wᵀ of tokens x [T, 1, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter = weight  # the saved tensor is another one where a layer is recomputed
        return torch.mm(x.flatten(0, 1), weight.t()).unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g, u = grad.flatten(0, 1), x.flatten(0, 1)
        return (g @ weight).unsqueeze(1), *_weight_gradients((ctx.parameter,), g, u)


class _JoinedLinears(torch.autograd.Function):
    """u Wᵀ, cut into columns.

    Where tokens are split, keeps the rank's own for backward and gathers them again there, while
    the gradient of u is computed. Its sum over the group travels while those of the weights are.
    """

    @staticmethod
    def forward(ctx: Any, split: bool, h: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.split = split
        ctx.save_for_backward(h, *weights)
        ctx.parameters = weights  # saved tensors are others where a layer is recomputed
        u, gathering = _gather(h) if split else (h, None)
        _wait(gathering)
        outs: list[Tensor] = []
        for part in _parts(weights, u.shape[0]):
            outs += _product(u, weights[part])
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, *weights = ctx.saved_tensors
        u, gathering = _gather(h) if ctx.split else (h, None)
        tokens = grads[0].shape[0]
        parts = [(part, joined_columns(grads[part])) for part in _parts(weights, tokens)]
        products = (joined @ joined_rows(weights[part]) for part, joined in parts)
        d_u = reduce(Tensor.add_, products)
        d_h, summing = _sum(d_u.unsqueeze(1), ctx.split)
        _wait(gathering)
        d_weights: list[Tensor | None] = []
        for part, joined in parts:
            d_weights += _weight_gradients(ctx.parameters[part], joined, u.flatten(0, 1))
        _wait(summing)
        return None, d_h, *d_weights


def _parts(weights: Sequence[Tensor], tokens: int) -> list[slice]:
    """Return which weights share a product: all of them, or, if a CPU's is large, none.

    On a CPU a large product is no faster than its parts, and slices of its buffer are read and
    written more slowly.
    """
    width = sum(weight.shape[0] for weight in weights)
    if weights[0].is_cpu and tokens * width * weights[0].element_size() > JOINED_BYTES:
        return [slice(n, n + 1) for n in range(len(weights))]
    return [slice(0, len(weights))]


def _product(u: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute u Wᵀ of tokens u [T, 1, in]: [T, 1, outᵢ] each, in one buffer."""
    widths = [weight.shape[0] for weight in weights]
    width = sum(widths)
    out = u.new_empty(*u.shape[:2], _padded(width))
    torch.mm(u.flatten(0, 1), joined_rows(weights).t(), out=out.flatten(0, 1)[:, :width])
    return columns(out, widths)


def _weight_gradients(weights: Sequence[Tensor], g: Tensor, u: Tensor) -> Sequence[Tensor | None]:
    """Gᵀ u for G [T, Σ outᵢ] and u [T, in], by weight [outᵢ, in].

    None of every weight where it was added to their `main_grad`.
    """
    rows = [weight.shape[0] for weight in weights]
    totals = [total for weight in weights if (total := main_grad(weight)) is not None]
    if len(totals) < len(weights):
        return (g.t() @ u).split(rows)
    if _lie_so(weights):  # and so do their sums
        joined = totals[0].as_strided((sum(rows), u.shape[1]), (u.shape[1], 1))
        add_product(joined, g.t(), u)
    else:
        for total, part in zip(totals, g.split(rows, -1), strict=True):
            add_product(total, part.t(), u)
    for weight in weights:
        mark(weight)
    return [None] * len(weights)


def columns(buffer: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """The first columns [T, 1, widthᵢ] of a buffer [T, 1, width], beside each other.

    Contiguous copies where kernels are not to read slices (`kernels.paths`).
    """
    # unsafe: for autograd they are no views of each other, so one may be overwritten
    parts = buffer.unsafe_split_with_sizes([*widths, buffer.shape[-1] - sum(widths)], -1)
    if is_off(COLUMN_SLICES):
        return tuple(part.contiguous() for part in parts[: len(widths)])
    return tuple(parts[: len(widths)])


def joined_rows(weights: Sequence[Tensor]) -> Tensor:
    """The rows of all weights [outᵢ, in] below each other: a view where they lie so in memory."""
    if not _lie_so(weights):
        return torch.cat(tuple(weights))
    first, rows = weights[0], sum(weight.shape[0] for weight in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _lie_so(weights: Sequence[Tensor]) -> bool:
    start = weights[0].storage_offset()
    for weight in weights:
        same = weight.untyped_storage()._cdata == weights[0].untyped_storage()._cdata
        if not same or weight.storage_offset() != start or not weight.is_contiguous():
            return False
        start += weight.numel()
    return True


def joined_columns(grads: Sequence[Tensor]) -> Tensor:
    """The columns of all gradients [T, 1, outᵢ] beside each other, [T, Σ outᵢ].

    A view where they are slices of one buffer.
    """
    tokens, columns = grads[0].shape[0], sum(grad.shape[-1] for grad in grads)
    if stride := shared_stride(grads):
        return grads[0].as_strided((tokens, columns), (stride, 1))
    buffer = grads[0].new_empty(tokens, _padded(columns))
    joined = buffer[:, :columns]
    for part, grad in zip(joined.split([g.shape[-1] for g in grads], -1), grads, strict=True):
        part.copy_(grad.flatten(0, 1))
    return joined


# -- where torch.compile traces: of one tensor-parallel rank, with gradients left to autograd ------


def _project_compiled(h: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outs: list[Tensor] = []
    for part in _parts(weights, h.shape[0]):
        buffer = joined_product(h, weights[part])
        outs += columns(buffer, [weight.shape[0] for weight in weights[part]])
    return tuple(outs)


@torch.library.custom_op("transxssm::joined_product", mutates_args=())
def joined_product(u: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Compute u Wᵀ of tokens u [T, 1, in]: [T, 1, Σ outᵢ and padding of zeros]."""
    width = sum(weight.shape[0] for weight in weights)
    out = u.new_empty(*u.shape[:2], _padded(width))
    out[..., width:].zero_()
    torch.mm(u.flatten(0, 1), joined_rows(weights).t(), out=out.flatten(0, 1)[:, :width])
    return out


@torch.library.custom_op("transxssm::joined_product_backward", mutates_args=())
def _joined_backward(grad: Tensor, u: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the gradients of u, and of W [Σ outᵢ, in]."""
    joined = grad.flatten(0, 1)[:, : sum(weight.shape[0] for weight in weights)]
    return (joined @ joined_rows(weights)).view(u.shape), joined.t() @ u.flatten(0, 1)


@joined_product.register_fake
def _(u: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return u.new_empty(*u.shape[:2], _padded(sum(weight.shape[0] for weight in weights)))


@_joined_backward.register_fake
def _(grad: Tensor, u: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows = sum(weight.shape[0] for weight in weights)
    return u.new_empty(u.shape), u.new_empty(rows, u.shape[-1])


def _save(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor]], output: Tensor) -> None:
    u, weights = inputs
    ctx.save_for_backward(u, *weights)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    u, *weights = ctx.saved_tensors
    d_u, d_joined = _joined_backward(grad, u, weights)
    return d_u, list(d_joined.split([weight.shape[0] for weight in weights]))


joined_product.register_autograd(_differentiate, setup_context=_save)


def _padded(width: int) -> int:
    """Columns of a buffer, as kernels and products like their rows."""
    return width + -width % ROW_ELEMENTS


def _gather(h: Tensor) -> tuple[Tensor, Any]:
    """All tokens of the tensor-parallel group, once the returned work is waited for."""
    group = get_tensor_model_parallel_group()
    u = h.new_empty(h.shape[0] * group.size(), *h.shape[1:])
    return u, dist.all_gather_into_tensor(u, h.contiguous(), group=group, async_op=True)


def _sum(d_u: Tensor, split: bool) -> tuple[Tensor, Any]:
    """d_u summed over the group, of which each rank gets its own tokens where they are split, once
    the returned work is waited for."""
    group = get_tensor_model_parallel_group()
    if split:
        d_h = d_u.new_empty(d_u.shape[0] // group.size(), *d_u.shape[1:])
        return d_h, dist.reduce_scatter_tensor(d_h, d_u, group=group, async_op=True)
    if group.size() == 1:
        return d_u, None
    return d_u, dist.all_reduce(d_u, group=group, async_op=True)


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
