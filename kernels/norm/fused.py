"""RMSNorm and weighted residual in Triton: one launch forward, one and a small one backward.

A program walks over its share of the rows and holds a whole row in registers, so statistics cost no
pass over memory, and backward finds them anew instead of loading them; the weights are loaded once.
Their gradients are sums over rows: each program writes one partial sum of each in float32, and a
second launch adds these in a fixed order and rounds once.
Formulas in `kernels.norm.norm`; all tensors [..., N], contiguous: T rows.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.target import current_target

# Two accesses of 128 bits for each array. Backward keeps up to four rows, both weights and their
# partial sums in a thread's registers; with more of each it spills.
BYTES_PER_THREAD = 32
# What fits an SM's 65,536 registers: forward needs at most 64 a thread, backward 128.
FORWARD_WARPS_PER_SM, BACKWARD_WARPS_PER_SM = 32, 16
# The tile in which partial sums are added: rows of 128 bytes, 16 loads in flight a thread.
SUM_PROGRAMS, SUM_CHANNELS, SUM_WARPS = 128, 32, 8


def forward(
    h: Tensor,
    update: Tensor | None,
    residual_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """h' (h itself without update) and u (None without norm_weight)."""
    new_h = h if update is None else torch.empty_like(h)
    u = None if norm_weight is None else torch.empty_like(h)
    channels = h.shape[-1]
    rows = h.numel() // channels
    block_rows, block_channels, num_warps = tile(channels, h.element_size())
    programs = forward_programs(rows, channels, h.element_size(), current_target().num_sms)
    if rows > 0:
        norm_forward_kernel[(programs,)](
            h, update, residual_weight, norm_weight, new_h, u, rows, programs, eps,
            N=channels, ADD=update is not None, NORM=norm_weight is not None,
            BLOCK_ROWS=block_rows, BLOCK_N=block_channels, num_warps=num_warps,
        )  # fmt: skip
    return new_h, u


def backward(
    d_new_h: Tensor | None,
    d_u: Tensor | None,
    h: Tensor | None,
    new_h: Tensor | None,
    residual_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of h, update, residual_weight and norm_weight; None for what forward lacked.

    d_new_h: None where nobody else reads h'; d_u: None where forward had no norm.
    """
    given = d_new_h if d_u is None else d_u
    assert given is not None
    channels = given.shape[-1]
    rows = given.numel() // channels
    block_rows, block_channels, num_warps = tile(channels, given.element_size())
    programs = backward_programs(rows, channels, given.element_size(), current_target().num_sms)
    add, norm = h is not None, new_h is not None
    d_h = torch.empty_like(given)
    d_update = None
    if add:
        d_update = torch.empty_like(given) if norm else d_new_h
    partial = given.new_empty(add + norm, programs, channels, dtype=torch.float32)
    d_weights = given.new_empty(add + norm, channels)
    if rows > 0:
        norm_backward_kernel[(programs,)](
            d_new_h, d_u, h, new_h, residual_weight, norm_weight, d_h, d_update, partial,
            rows, programs, eps,
            N=channels, ADD=add, NORM=norm, BLOCK_ROWS=block_rows, BLOCK_N=block_channels,
            num_warps=num_warps,
        )  # fmt: skip
    weight_gradient_kernel[(-(-channels // SUM_CHANNELS), add + norm)](
        partial, d_weights, programs,
        N=channels, BLOCK_PROGRAMS=SUM_PROGRAMS, BLOCK_N=SUM_CHANNELS, num_warps=SUM_WARPS,
    )  # fmt: skip
    return d_h, d_update, d_weights[0] if add else None, d_weights[-1] if norm else None


@lru_cache
def tile(channels: int, itemsize: int) -> tuple[int, int, int]:
    """Rows and channels of a program's tile, and its warps; the same for every architecture.

    A whole row, several if it is short, at 32 bytes a thread and 4 warps at least.
    """
    block_channels = triton.next_power_of_2(channels)
    warp = 32 * BYTES_PER_THREAD // itemsize
    block_rows = max(1, 4 * warp // block_channels)
    return block_rows, block_channels, block_rows * block_channels // warp


@lru_cache
def forward_programs(rows: int, channels: int, itemsize: int, num_sms: int) -> int:
    """As many programs as run at once; rows are shared evenly."""
    block_rows, _, num_warps = tile(channels, itemsize)
    return min(-(-rows // block_rows), num_sms * (FORWARD_WARPS_PER_SM // num_warps))


@lru_cache
def backward_programs(rows: int, channels: int, itemsize: int, num_sms: int) -> int:
    """As many programs as run at once, so that partial sums are few; rows are shared evenly."""
    block_rows, _, num_warps = tile(channels, itemsize)
    return min(-(-rows // block_rows), num_sms * (BACKWARD_WARPS_PER_SM // num_warps))


def forward_traffic(
    rows: int, channels: int, itemsize: int, num_sms: int, *, add: bool, norm: bool
) -> tuple[int, int]:
    """Bytes loaded and stored by the forward kernel."""
    programs = forward_programs(rows, channels, itemsize, num_sms)
    row = channels * itemsize
    return rows * row * (1 + add) + programs * row * (add + norm), rows * row * (add + norm)


def backward_traffic(
    rows: int, channels: int, itemsize: int, num_sms: int, *, add: bool, norm: bool
) -> tuple[int, int]:
    """Bytes loaded and stored by the backward kernels, where h' has other readers."""
    programs = backward_programs(rows, channels, itemsize, num_sms)
    row, partial = channels * itemsize, programs * channels * 4
    loaded = rows * row * (1 + add + 2 * norm) + (programs * row + partial) * (add + norm)
    stored = rows * row * (1 + (add and norm)) + (partial + row) * (add + norm)
    return loaded, stored


@triton.jit
def norm_forward_kernel(
    h, update, residual_weight, norm_weight, new_h, u, rows, programs, eps,
    N: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_N)[None, :]
    within = channel < N
    if ADD:
        r = tl.load(residual_weight + channel, mask=within, other=0.0).to(tl.float32)
    if NORM:
        w = tl.load(norm_weight + channel, mask=within, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), programs):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & within
        at = row * N + channel
        x = tl.load(h + at, mask=mask, other=0.0)
        if ADD:
            d = tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
            x = (r * x.to(tl.float32) + d).to(new_h.dtype.element_ty)
            tl.store(new_h + at, x, mask=mask)
        if NORM:
            y = x.to(tl.float32)
            y *= tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) / N + eps)
            tl.store(u + at, (y * w).to(u.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    d_new_h, d_u, h, new_h, residual_weight, norm_weight, d_h, d_update, partial,
    rows, programs, eps,
    N: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_N)[None, :]
    within = channel < N
    d_residual = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
    d_norm = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
    if ADD:
        r = tl.load(residual_weight + channel, mask=within, other=0.0).to(tl.float32)
    if NORM:
        w = tl.load(norm_weight + channel, mask=within, other=0.0).to(tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & within
        at = row * N + channel
        total = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
        if d_new_h is not None:
            total += tl.load(d_new_h + at, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            x = tl.load(new_h + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(d_u + at, mask=mask, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / N + eps)
            x *= scale
            d_norm += g * x
            g *= w
            total += scale * (g - x * (tl.sum(g * x, axis=1, keep_dims=True) / N))
        if ADD:
            previous = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
            d_residual += total * previous
            if NORM:
                tl.store(d_update + at, total.to(d_update.dtype.element_ty), mask=mask)
            total *= r
        tl.store(d_h + at, total.to(d_h.dtype.element_ty), mask=mask)
    if ADD:
        tl.store(partial + program * N + channel, tl.sum(d_residual, axis=0)[None, :], mask=within)
        partial += programs * N
    if NORM:
        tl.store(partial + program * N + channel, tl.sum(d_norm, axis=0)[None, :], mask=within)


@triton.jit
def weight_gradient_kernel(
    partial, gradient, programs,
    N: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """gradient [weights, N] = the sum of partial [weights, programs, N] over programs."""
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    within = channel < N
    weight = tl.program_id(1)
    source = partial + tl.cast(weight, tl.int64) * programs * N + channel
    total = tl.zeros((BLOCK_PROGRAMS, BLOCK_N), tl.float32)
    for first in range(0, programs, BLOCK_PROGRAMS):
        program = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        mask = (program < programs) & within
        total += tl.load(source + program * N, mask=mask, other=0.0)
    result = tl.sum(total, axis=0)[None, :].to(gradient.dtype.element_ty)
    tl.store(gradient + weight * N + channel, result, mask=within)
