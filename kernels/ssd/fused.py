"""The SSD scan in Triton: what is launched, forward and backward.

Every launch is of a fixed tile (`kernels.ssd.tiles`), deterministic and without atomics: per-token
gradients are written once, those of per-head vectors as one number a program, which a last launch
sums.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.paths import SCAN_SEGMENTS, is_off
from kernels.slices import empty_together, row_stride
from kernels.ssd.choice import choose_shape
from kernels.ssd.fused_backward import (
    chunk_backward_kernel,
    scan_backward_kernel,
    vector_gradient_kernel,
)
from kernels.ssd.fused_forward import chunk_output_kernel, chunk_state_kernel, scan_kernel
from kernels.ssd.fused_parts import state_passing_kernel
from kernels.ssd.shapes import Problem, Shape
from kernels.ssd.tables import ScanTables
from kernels.ssd.tiles import Tile, tile
from kernels.ssd.traffic import PASSING_BLOCK
from kernels.target import Target, current_target

_PASSING_STAGES = 8
_VECTOR_BLOCK = 128


def ssd_fused(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, tables: ScanTables, dt_bias: Tensor,
    chunk_size: int, initial_state: Tensor | None, D: Tensor | None, log_A: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, L, H, P] and the final state [B, H, P, N]; arguments as `kernels.ssd.ssd.ssd`.

    log_A: A holds log(-A), in any floating dtype.
    """
    result: tuple[Tensor, Tensor] = _FusedScan.apply(
        x,
        dt,
        A,
        B,
        C,
        tables.rotation,
        dt_bias,
        tables.documents,
        initial_state,
        D,
        chunk_size,
        log_A,
    )
    return result


class _FusedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, table: Tensor | None,
        dt_bias: Tensor, documents: Tensor, initial_state: Tensor | None, D: Tensor | None,
        chunk_size: int, log_A: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        target = current_target()
        choice = tile(target, x.dtype, x.shape[3], B.shape[3], chunk_size)
        y, final, states = scan_forward(
            x, dt, A, B, C, table, dt_bias, documents, initial_state, D, choice, log_A,
            any(ctx.needs_input_grad), target,
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, table, dt_bias, documents, D, states)
        ctx.choice, ctx.log_A = choice, log_A
        ctx.has_initial_state = initial_state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, table, dt_bias, documents, D, states = ctx.saved_tensors
        dx, ddt, dA, dB, dC, d_bias, d_initial, dD = scan_backward(
            dy, d_final, x, dt, A, B, C, table, dt_bias, documents, D, states, ctx.choice,
            ctx.log_A, ctx.has_initial_state,
        )  # fmt: skip
        return dx, ddt, dA, dB, dC, None, d_bias, None, d_initial, dD, None, None


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, table: Tensor | None, dt_bias: Tensor,
    documents: Tensor, initial_state: Tensor | None, D: Tensor | None, choice: Tile, log_A: bool,
    keep_states: bool, target: Target,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, the final state, and where kept the state at the entry of every chunk, [B·H, K, P, N]."""
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    problem = Problem(batch, length, heads, groups, head_dim, state_dim, x.dtype)
    shape = _shape(problem, choice, target, backward=False)
    chunks = -(-length // choice.chunk)
    y = x.new_empty(x.shape)
    final = x.new_empty(batch, heads, head_dim, state_dim, dtype=torch.float32)
    constants = _constants(problem, choice, log_A)
    rows = {"X_ROW": row_stride(x), "B_ROW": row_stride(B), "DT_ROW": row_stride(dt)}
    kept = (batch * heads, chunks, head_dim, state_dim)
    states = x.new_empty(kept) if keep_states or shape.kind == "split" else None
    if shape.kind == "split":
        assert states is not None
        grid = chunks, batch * heads // shape.heads
        decays = x.new_empty(batch * heads, chunks, dtype=torch.float32)
        chunk_state_kernel[grid](
            x, dt, A, B, table, dt_bias, documents, states, decays,
            length, chunks, WALKED=shape.heads, SPAN=1, GRADIENT=False, **constants, **rows,
        )  # fmt: skip
        _pass_states(states, decays, initial_state, final, reverse=False)
        chunk_output_kernel[grid](
            x, dt, A, B, C, table, dt_bias, D, documents, states, y,
            length, chunks, WALKED=shape.heads, **constants, **rows, C_ROW=row_stride(C),
        )  # fmt: skip
    else:
        exits, carries = _exits(x, batch * heads, head_dim, state_dim, shape)
        programs = batch * groups * -(-problem.per_group // shape.heads)
        for phase in _phases(shape):
            scan_kernel[(programs, head_dim // choice.p_block, max(1, shape.segments - 1))](
                x, dt, A, B, C, table, dt_bias, D, documents, initial_state, y, states, final,
                exits, carries, length, chunks, shape.segments, shape.edge, shape.middle, 0,
                AT_ONCE=shape.heads, PHASE=phase, **constants, **rows, C_ROW=row_stride(C),
            )  # fmt: skip
    return y, final, states


def scan_backward(
    dy: Tensor | None, d_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
    C: Tensor, table: Tensor | None, dt_bias: Tensor, documents: Tensor, D: Tensor | None,
    states: Tensor, choice: Tile, log_A: bool, has_initial_state: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C, dt_bias, the initial state and D, from `scan_forward`'s states.

    None for an initial state or D that there was not. Those of x, B, C and dt are slices of one
    buffer where these are.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    problem = Problem(batch, length, heads, groups, head_dim, state_dim, x.dtype)
    chunks = states.shape[1]
    shape = _shape(problem, choice, current_target(), backward=True)
    dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    dx, dB, dC, ddt = empty_together(x, B, C, dt)
    d_initial: Tensor | None = None
    if has_initial_state:
        d_initial = x.new_empty(batch, heads, head_dim, state_dim, dtype=torch.float32)
    constants = _constants(problem, choice, log_A)
    rows = {
        "X_ROW": row_stride(x), "B_ROW": row_stride(B), "C_ROW": row_stride(C),
        "DT_ROW": row_stride(dt), "D_X_ROW": row_stride(dx), "D_BC_ROW": row_stride(dB),
        "D_DT_ROW": row_stride(ddt),
    }  # fmt: skip
    dA, d_bias, dD = x.new_empty(3, batch * heads, chunks, dtype=torch.float32)
    if shape.kind == "split":
        spans = -(-chunks // shape.span)
        decays = x.new_empty(batch * heads, spans, dtype=torch.float32)
        d_states = x.new_empty(batch * heads, spans, head_dim, state_dim)
        chunk_state_kernel[(spans, batch * groups)](
            dy, dt, A, C, table, dt_bias, documents, d_states, decays,
            length, chunks, WALKED=shape.heads, SPAN=shape.span, GRADIENT=True, **constants,
            X_ROW=heads * head_dim, B_ROW=row_stride(C), DT_ROW=row_stride(dt),
        )  # fmt: skip
        _pass_states(d_states, decays, d_final, d_initial, reverse=True)
        chunk_backward_kernel[(chunks, batch * groups)](
            x, dt, A, B, C, table, dt_bias, D, documents, states, d_states, dy,
            dx, dB, dC, ddt, dA, d_bias, dD,
            length, chunks, 0, SPAN=shape.span, **constants, **rows,
        )  # fmt: skip
    else:
        del constants["GROUPS"], constants["P_BLOCK"]
        exits, carries = _exits(x, batch * heads, head_dim, state_dim, shape)
        for phase in _phases(shape):
            scan_backward_kernel[(batch * heads, max(1, shape.segments - 1))](
                x, dt, A, B, C, table, dt_bias, D, documents, states, dy, d_final,
                dx, dB, dC, ddt, dA, d_bias, dD, d_initial, exits, carries,
                length, chunks, shape.segments, shape.edge, shape.middle, 0,
                PHASE=phase, **constants, **rows,
            )  # fmt: skip
    A_out, bias_out = torch.empty_like(A), torch.empty_like(dt_bias)
    D_out = None if D is None else torch.empty_like(D)
    vector_gradient_kernel[(heads,)](
        A, dA, d_bias, dD, A_out, bias_out, D_out, batch, chunks,
        HEADS=heads, BLOCK=_VECTOR_BLOCK, LOG_A=log_A,
    )  # fmt: skip
    return dx, ddt, A_out, dB, dC, bias_out, d_initial, D_out


def _shape(problem: Problem, choice: Tile, target: Target, *, backward: bool) -> Shape:
    return choose_shape(problem, choice, target, backward, not is_off(SCAN_SEGMENTS))


def _phases(shape: Shape) -> tuple[int, ...]:
    """The launches of a shape that is not split."""
    return (0,) if shape.kind == "fused" else (1, 2)


def _exits(
    x: Tensor, sequences: int, head_dim: int, state_dim: int, shape: Shape
) -> tuple[Tensor | None, Tensor | None]:
    """What the first launch of a segmented pass leaves to the second."""
    if shape.kind == "fused":
        return None, None
    slots = shape.segments - 1
    exits = x.new_empty(sequences, slots, head_dim, state_dim, dtype=torch.float32)
    return exits, x.new_empty(sequences, slots, dtype=torch.float32)


def _pass_states(
    states: Tensor, carries: Tensor, first: Tensor | None, last: Tensor | None, reverse: bool
) -> None:
    size = states.shape[2] * states.shape[3]
    block = min(size, PASSING_BLOCK)
    state_passing_kernel[(states.shape[0], size // block)](
        states, carries, first, last, states.shape[1],
        SIZE=size, BLOCK=block, AHEAD=_PASSING_STAGES, REVERSE=reverse,
    )  # fmt: skip


def _constants(problem: Problem, choice: Tile, log_A: bool) -> dict[str, Any]:
    exact = torch.get_float32_matmul_precision() == "highest"
    launch = {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
    if choice.maxnreg is not None:
        launch["maxnreg"] = choice.maxnreg
    return {
        "HEADS": problem.heads, "GROUPS": problem.groups, "P": problem.head_dim,
        "N": problem.state_dim, "Q": choice.chunk, "P_BLOCK": choice.p_block, "LOG_A": log_A,
        "PRECISION": "ieee" if exact else "tf32", **launch,
    }  # fmt: skip
