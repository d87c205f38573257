"""The SSD scan in Triton: what is launched, forward and backward.

Every launch is of a fixed tile (`kernels.ssd.tiles`), deterministic and without atomics: per-token
gradients are written once, those of per-head vectors as one number a program, summed afterwards.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.slices import empty_together, row_stride
from kernels.ssd.fused_backward import (
    chunk_backward_kernel,
    decay_gradient_kernel,
    scan_backward_kernel,
)
from kernels.ssd.fused_forward import chunk_output_kernel, chunk_state_kernel, scan_kernel
from kernels.ssd.fused_parts import state_passing_kernel
from kernels.ssd.tables import ScanTables
from kernels.ssd.tiles import Tile, backward_is_fused, fills_gpu, tile
from kernels.target import current_target

_PASSING_BLOCK = 1024
_PASSING_STAGES = 8


def ssd_fused(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, tables: ScanTables, dt_bias: Tensor,
    chunk_size: int, initial_state: Tensor | None, D: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, L, H, P] and the final state [B, H, P, N]; arguments as `kernels.ssd.ssd.ssd`."""
    result: tuple[Tensor, Tensor] = _FusedScan.apply(
        x, dt, A, B, C, tables.rotation, dt_bias, tables.documents, initial_state, D, chunk_size
    )
    return result


class _FusedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, table: Tensor | None,
        dt_bias: Tensor, documents: Tensor, initial_state: Tensor | None, D: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, length, heads, head_dim = x.shape
        state_dim, groups = B.shape[-1], B.shape[2]
        target = current_target()
        choice = tile(target, x.dtype, head_dim, state_dim, chunk_size)
        chunks = triton.cdiv(length, choice.chunk)
        y = x.new_empty(x.shape)
        final = x.new_empty(batch, heads, head_dim, state_dim, dtype=torch.float32)
        constants = _constants(heads, groups, head_dim, state_dim, choice)
        rows = {"X_ROW": row_stride(x), "B_ROW": row_stride(B), "DT_ROW": row_stride(dt)}
        blocks = head_dim // choice.p_block
        fused = fills_gpu(batch * heads * blocks, target.num_sms)
        keep = any(ctx.needs_input_grad) or not fused
        shape = (batch * heads, chunks, head_dim, state_dim)
        states = x.new_empty(shape) if keep else None
        if fused:
            scan_kernel[(batch * heads, blocks)](
                x, dt, A, B, C, table, dt_bias, D, documents, initial_state, y, states, final,
                length, chunks, 0, **constants, **rows, C_ROW=row_stride(C),
            )  # fmt: skip
        else:
            assert states is not None
            carries = x.new_empty(batch * heads, chunks, dtype=torch.float32)
            chunk_state_kernel[(chunks, batch * heads)](
                x, dt, A, B, table, dt_bias, documents, states, carries,
                length, chunks, GRADIENT=False, **constants, **rows,
            )  # fmt: skip
            _pass_states(states, carries, initial_state, final, reverse=False)
            chunk_output_kernel[(chunks, batch * heads)](
                x, dt, A, B, C, table, dt_bias, D, documents, states, y,
                length, chunks, **constants, **rows, C_ROW=row_stride(C),
            )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, table, dt_bias, documents, D, states)
        ctx.choice, ctx.has_initial_state = choice, initial_state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, table, dt_bias, documents, D, states = ctx.saved_tensors
        choice: Tile = ctx.choice
        batch, length, heads, head_dim = x.shape
        groups, state_dim = B.shape[2:]
        chunks = states.shape[1]
        target = current_target()
        dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        dx, dB, dC, ddt = empty_together(x, B, C, dt)
        by_head = dB, dC
        if groups < heads:  # they write gradients of their own, which are summed in float32
            per_head = batch, length, heads, state_dim
            by_head = tuple(x.new_empty(per_head, dtype=torch.float32) for _ in range(2))
        d_initial = torch.empty_like(states[:, 0], dtype=torch.float32)
        constants = _constants(heads, groups, head_dim, state_dim, choice)
        dt_row = row_stride(dt)
        rows = {
            "X_ROW": row_stride(x), "B_ROW": row_stride(B), "C_ROW": row_stride(C),
            "DT_ROW": dt_row, "D_X_ROW": row_stride(dx), "D_BC_ROW": row_stride(by_head[0]),
        }  # fmt: skip
        fused = backward_is_fused(target, x.dtype, batch * heads)
        per_chunk = (batch * heads, chunks)
        dA, d_bias, through = (x.new_empty(per_chunk, dtype=torch.float32) for _ in range(3))
        dD = dA.new_empty(batch * heads, 1 if fused else chunks)
        sums = [x.new_empty(dt.shape, dtype=torch.float32) for _ in range(4)]
        if fused:
            scan_backward_kernel[(batch * heads,)](
                x, dt, A, B, C, table, dt_bias, D, documents, states, dy, d_final,
                dx, *by_head, *sums, through, dD,
                d_initial if ctx.has_initial_state else None,
                length, chunks, 0, **constants, **rows,
            )  # fmt: skip
        else:
            carries = x.new_empty(batch * heads, chunks, dtype=torch.float32)
            d_states = torch.empty_like(states)
            chunk_state_kernel[(chunks, batch * heads)](
                dy, dt, A, C, table, dt_bias, documents, d_states, carries,
                length, chunks, GRADIENT=True, **constants,
                X_ROW=heads * head_dim, B_ROW=row_stride(C), DT_ROW=dt_row,
            )  # fmt: skip
            _pass_states(d_states, carries, d_final, d_initial, reverse=True)
            chunk_backward_kernel[(chunks, batch * heads)](
                x, dt, A, B, C, table, dt_bias, D, documents, states, d_states, dy,
                dx, *by_head, *sums, through, dD,
                length, chunks, 0, **constants, **rows,
            )  # fmt: skip
        decay_gradient_kernel[(chunks, batch * heads)](
            dt, A, dt_bias, documents, *sums, through, ddt, dA, d_bias,
            length, chunks, HEADS=heads, Q=choice.chunk, DT_ROW=dt_row, D_DT_ROW=row_stride(ddt),
        )  # fmt: skip
        if groups < heads:
            for own, whole in zip(by_head, (dB, dC), strict=True):
                whole.copy_(own.unflatten(2, (groups, -1)).sum(3))
        dA, d_bias, dD = (t.view(batch, heads, -1).sum((0, 2)) for t in (dA, d_bias, dD))
        return (
            dx, ddt, dA, dB, dC, None, d_bias.to(dt_bias.dtype), None,
            d_initial.view(batch, heads, head_dim, state_dim) if ctx.has_initial_state else None,
            None if D is None else dD.to(D.dtype), None,
        )  # fmt: skip


def _pass_states(
    states: Tensor, carries: Tensor, first: Tensor | None, last: Tensor, reverse: bool
) -> None:
    size = states.shape[2] * states.shape[3]
    block = min(size, _PASSING_BLOCK)
    state_passing_kernel[(states.shape[0], size // block)](
        states, carries, first, last, states.shape[1],
        SIZE=size, BLOCK=block, AHEAD=_PASSING_STAGES, REVERSE=reverse,
    )  # fmt: skip


def _constants(
    heads: int, groups: int, head_dim: int, state_dim: int, choice: Tile
) -> dict[str, Any]:
    exact = torch.get_float32_matmul_precision() == "highest"
    launch = {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
    if choice.maxnreg is not None:
        launch["maxnreg"] = choice.maxnreg
    return {
        "HEADS": heads, "GROUPS": groups, "P": head_dim, "N": state_dim, "Q": choice.chunk,
        "P_BLOCK": choice.p_block, "PRECISION": "ieee" if exact else "tf32", **launch,
    }  # fmt: skip
