"""Column-parallel projections of the same tokens, as one matrix product each way.

    [x₁ | x₂ | ...] = u Wᵀ        W = [W₁; W₂; ...]        u: tokens of the whole tensor group
    dW = Gᵀ u,  du = G W          G = [dx₁ | dx₂ | ...]

Parameters and their names stay apart. After DeepSpeed's ZeRO 1 and 2 have flattened them, the Wᵢ
lie one after the other in memory, and W is a view; elsewhere they are concatenated. The xᵢ are
column slices of one buffer, and kernels write the dxᵢ into another like it (`kernels.slices`),
which then is G.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.slices import ROW_ELEMENTS, shared_stride


def project(
    h: Tensor, linears: Sequence[ColumnParallelLinear], config: ModelParallelConfig
) -> tuple[Tensor, ...]:
    """Project h [T or T/tp, 1, hidden] by every linear: [T, 1, out / tp] each, in one buffer."""
    split = config.sequence_parallel
    weights = (linear.weight for linear in linears)
    projected: tuple[Tensor, ...] = _JoinedLinears.apply(split, h, *weights)
    return projected


class _JoinedLinears(torch.autograd.Function):
    """u Wᵀ, cut into columns.

    Where tokens are split, keeps the rank's own for backward and gathers them again there, while
    the gradient of u is computed. Its sum over the group travels while those of the weights are.
    """

    @staticmethod
    def forward(ctx: Any, split: bool, h: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.split = split
        ctx.save_for_backward(h, *weights)
        u, gathering = _gather(h) if split else (h, None)
        _wait(gathering)
        widths = [weight.shape[0] for weight in weights]
        columns = sum(widths)
        rest = -columns % ROW_ELEMENTS
        out = u.new_empty(*u.shape[:2], columns + rest)
        torch.mm(u.flatten(0, 1), joined_rows(weights).t(), out=out.flatten(0, 1)[:, :columns])
        # unsafe: for autograd they are no views of each other, so one may be overwritten
        return tuple(out.unsafe_split_with_sizes([*widths, rest], -1)[: len(widths)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, *weights = ctx.saved_tensors
        u, gathering = _gather(h) if ctx.split else (h, None)
        joined = joined_columns(grads)
        d_h, summing = _sum((joined @ joined_rows(weights)).unsqueeze(1), ctx.split)
        _wait(gathering)
        d_weights = joined.t() @ u.flatten(0, 1)
        _wait(summing)
        return None, d_h, *d_weights.split([weight.shape[0] for weight in weights])


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
    buffer = grads[0].new_empty(tokens, columns + -columns % ROW_ELEMENTS)
    joined = buffer[:, :columns]
    for part, grad in zip(joined.split([g.shape[-1] for g in grads], -1), grads, strict=True):
        part.copy_(grad.flatten(0, 1))
    return joined


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
