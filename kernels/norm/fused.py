"""RMSNorm and weighted residual in Triton: one launch forward, one and a small sum backward.

A program walks over its share of the rows and holds a whole row in registers, so statistics cost no
pass over memory, and backward finds them anew instead of loading them; the weights are loaded once.
Their gradients are sums over rows: each program writes one partial sum, added in a fixed order.
Formulas in `kernels.norm.norm`; all tensors [..., N], contiguous: T rows.
"""

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
    """Gradients of h, update, residual_weight and norm_weight; None for what forward lacked."""
    given = d_new_h if d_u is None else d_u
    assert given is not None
    channels = given.shape[-1]
    rows = given.numel() // channels
    block_rows, block_channels, num_warps = tile(channels, given.element_size())
    programs = backward_programs(rows, channels, given.element_size(), current_target().num_sms)
    add, norm = h is not None, new_h is not None
    d_h = torch.empty_like(given)
    d_update = torch.empty_like(given) if add and norm else d_new_h
    weights = [w for w in (residual_weight, norm_weight) if w is not None]
    partial = given.new_empty(len(weights), programs, channels, dtype=torch.float32)
    if rows > 0:
        norm_backward_kernel[(programs,)](
            d_new_h, d_u, h, new_h, residual_weight, norm_weight, d_h, d_update, partial,
            rows, programs, eps,
            N=channels, ADD=add, NORM=norm, BLOCK_ROWS=block_rows, BLOCK_N=block_channels,
            num_warps=num_warps,
        )  # fmt: skip
    sums = partial.sum(1).to(given.dtype)  # [1 or 2, N]
    return d_h, d_update, sums[0] if add else None, sums[-1] if norm else None


def tile(channels: int, itemsize: int) -> tuple[int, int, int]:
    """Rows and channels of a program's tile, and its warps; the same for every architecture.

    A whole row, several if it is short, at 32 bytes a thread and 4 warps at least.
    """
    block_channels = triton.next_power_of_2(channels)
    warp = 32 * BYTES_PER_THREAD // itemsize
    block_rows = max(1, 4 * warp // block_channels)
    return block_rows, block_channels, block_rows * block_channels // warp


def forward_programs(rows: int, channels: int, itemsize: int, num_sms: int) -> int:
    """As many programs as run at once; rows are shared evenly."""
    block_rows, _, num_warps = tile(channels, itemsize)
    return min(triton.cdiv(rows, block_rows), num_sms * (FORWARD_WARPS_PER_SM // num_warps))


def backward_programs(rows: int, channels: int, itemsize: int, num_sms: int) -> int:
    """As many programs as run at once, so that partial sums are few; rows are shared evenly."""
    block_rows, _, num_warps = tile(channels, itemsize)
    return min(triton.cdiv(rows, block_rows), num_sms * (BACKWARD_WARPS_PER_SM // num_warps))


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
    """Bytes loaded and stored by the backward kernel, partial sums included."""
    programs = backward_programs(rows, channels, itemsize, num_sms)
    row = channels * itemsize
    loaded = rows * row * 2 * (add + norm) + programs * row * (add + norm)
    stored = rows * row * (1 + (add and norm)) + programs * channels * 4 * (add + norm)
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
        if ADD:
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
