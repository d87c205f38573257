"""The Triton scan as operators that torch.compile takes as they are.

Arguments as `kernels.ssd.fused` has them. A tile is its numbers, so that a compiled graph computes
what was chosen when it was traced; what an operation lacks is None among its inputs, and has no
elements among its results.
"""

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from kernels.ssd.tables import ScanTables
from kernels.target import current_target, launch_on


def ssd_compiled(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, tables: ScanTables, dt_bias: Tensor,
    chunk_size: int, initial_state: Tensor | None, D: Tensor | None, log_A: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.ssd.fused.ssd_fused`, where torch.compile traces."""
    numbers = tile_numbers(x.dtype, x.shape[-1], B.shape[-1], chunk_size)
    inputs = (x, dt, A, B, C, dt_bias, initial_state, D)
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, final, _ = fused_scan_operator(
        x, dt, A, B, C, tables.rotation, dt_bias, tables.documents, initial_state, D,
        numbers, log_A, backward,
    )  # fmt: skip
    return y, final


@torch.compiler.assume_constant_result
def tile_numbers(
    dtype: torch.dtype, head_dim: int, state_dim: int, chunk_size: int
) -> tuple[int, ...]:
    """Return the tile that eager execution takes, as numbers; 0 registers: no limit."""
    from kernels.ssd.tiles import tile

    chosen = astuple(tile(current_target(), dtype, head_dim, state_dim, chunk_size))
    return tuple(number or 0 for number in chosen)


@torch.library.custom_op("transxssm::fused_scan", mutates_args=())
def fused_scan_operator(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, table: Tensor | None, dt_bias: Tensor,
    documents: Tensor, initial_state: Tensor | None, D: Tensor | None, tile: list[int],
    log_A: bool, backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, the final state and, where a `backward` will follow, states at chunks' entries."""
    from kernels.ssd.fused import scan_forward

    with launch_on(x):
        y, final, states = scan_forward(
            x, dt, A, B, C, table, dt_bias, documents, initial_state, D, _tile(tile), log_A,
            backward, current_target(),
        )  # fmt: skip
    return y, final, states if states is not None and backward else x.new_empty(0)


@torch.library.custom_op("transxssm::fused_scan_backward", mutates_args=())
def _backward(
    dy: Tensor | None, d_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
    C: Tensor, table: Tensor | None, dt_bias: Tensor, documents: Tensor, D: Tensor | None,
    states: Tensor, tile: list[int], log_A: bool, has_initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, dt_bias, the initial state and D."""
    from kernels.ssd.fused import scan_backward

    with launch_on(x):
        dx, ddt, dA, dB, dC, d_bias, d_initial, dD = scan_backward(
            dy, d_final, x, dt, A, B, C, table, dt_bias, documents, D, states, _tile(tile), log_A,
            has_initial_state,
        )  # fmt: skip
    # the results of an operator may not share memory
    dx, ddt, dB, dC = (t.contiguous() for t in (dx, ddt, dB, dC))
    none = x.new_empty(0) if d_initial is None else d_initial
    return dx, ddt, dA, dB, dC, d_bias, none, x.new_empty(0) if dD is None else dD


def _tile(numbers: list[int]) -> Any:
    from kernels.ssd.tiles import Tile

    chunk, p_block, warps, stages, registers = numbers
    return Tile(chunk, p_block, warps, stages, registers or None)


@fused_scan_operator.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, tile, _, backward = rest
    batch, length, heads, head_dim = x.shape
    state_dim, chunks = B.shape[-1], -(-length // tile[0])
    final = x.new_empty(batch, heads, head_dim, state_dim, dtype=torch.float32)
    kept = (batch * heads, chunks, head_dim, state_dim) if backward else (0,)
    return x.new_empty(x.shape), final, x.new_empty(kept)


@_backward.register_fake
def _(dy: Tensor | None, d_final: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, _, dt_bias, _, D, _, _, _, has_initial_state = rest
    shape = (*x.shape[:1], *x.shape[2:], B.shape[-1]) if has_initial_state else (0,)
    d_initial = x.new_empty(shape, dtype=torch.float32 if has_initial_state else x.dtype)
    dD = x.new_empty(0) if D is None else D.new_empty(D.shape)
    return *(t.new_empty(t.shape) for t in (x, dt, A, B, C, dt_bias)), d_initial, dD


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_state, D, ctx.tile, ctx.log_A, _ = inputs
    ctx.save_for_backward(*tensors, D, output[2])
    ctx.has_initial_state, ctx.has_D = initial_state is not None, D is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Any, ...]:
    dx, ddt, dA, dB, dC, d_bias, d_initial, dD = _backward(
        dy, d_final, *ctx.saved_tensors, ctx.tile, ctx.log_A, ctx.has_initial_state
    )
    return (
        dx, ddt, dA, dB, dC, None, d_bias, None, d_initial if ctx.has_initial_state else None,
        dD if ctx.has_D else None, None, None, None,
    )  # fmt: skip


fused_scan_operator.register_autograd(_differentiate, setup_context=_save)
