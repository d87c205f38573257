"""One token of the SSD recurrence in Triton: decay, write, rotation and read in one launch.

A program holds some rows of one head's state. The state's channels come as two tiles, the halves
that RoPE pairs, so that rotating B and C moves nothing between threads. What matters is the state's
way from and to memory; all else is a few hundred bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
# 8 elements a thread of each half: accesses of 128 bits, and many programs even for one sequence.
TILE_ELEMENTS = NUM_WARPS * 32 * 8


def step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None,
    sin: Tensor | None, dt_bias: Tensor, D: Tensor | None, new_state: Tensor,
) -> Tensor:  # fmt: skip
    """y, contiguous; arguments as `kernels.ssd.step.ssd_step`, checked. Writes to new_state."""
    batch, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    block_rows, block_half = tile(head_dim, state_dim)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    ssd_step_kernel[(batch * heads, -(-head_dim // block_rows))](
        state, x, dt, A, B, C,
        None if cos is None else cos.contiguous(), None if sin is None else sin.contiguous(),
        dt_bias.contiguous(), None if D is None else D.contiguous(), new_state, y,
        heads, heads // groups,
        *x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2],
        P=head_dim, N=state_dim, HALF=-(-state_dim // 2),
        BLOCK_ROWS=block_rows, BLOCK_HALF=block_half, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


def tile(head_dim: int, state_dim: int) -> tuple[int, int]:
    """Rows of the state and half of its channels in a program; for every architecture and dtype."""
    block_half = triton.next_power_of_2(-(-state_dim // 2))
    rows = max(1, TILE_ELEMENTS // block_half)
    return min(rows, triton.next_power_of_2(head_dim)), block_half


def traffic(
    batch: int, heads: int, head_dim: int, state_dim: int, itemsize: int, state_itemsize: int
) -> tuple[int, int]:
    """Bytes loaded and stored with rotation, dt in x's dtype, float32 A and dt_bias, no D."""
    block_rows, _ = tile(head_dim, state_dim)
    programs = batch * heads * -(-head_dim // block_rows)
    state = batch * heads * head_dim * state_dim * state_itemsize
    rows = batch * heads * head_dim * itemsize
    each = (
        2 * state_dim * itemsize + state_dim * 4 + itemsize + 4 + 4
    )  # B, C; cos, sin; dt, A, bias
    return state + rows + programs * each, state + rows


@triton.jit
def ssd_step_kernel(
    state, x, dt, A, B, C, cos, sin, dt_bias, D, new_state, y,
    heads, heads_per_group,
    x_batch, x_head, dt_batch, dt_head, b_batch, b_group, c_batch, c_group,
    P: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    group = head // heads_per_group
    p = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.arange(0, BLOCK_HALF)
    first, second = n < HALF, (n < HALF) & (n + HALF < N)

    delta = _softplus(
        tl.load(dt + batch * dt_batch + head * dt_head).to(tl.float32)
        + tl.load(dt_bias + head).to(tl.float32)
    )
    decay = tl.exp(delta * tl.load(A + head))
    B += batch * b_batch + group * b_group + n
    C += batch * c_batch + group * c_group + n
    b1, b2 = _halves(B, first, second, HALF)
    c1, c2 = _halves(C, first, second, HALF)
    if cos is not None:
        turn = batch * HALF + n
        re = tl.load(cos + turn, mask=first, other=0.0)
        im = tl.load(sin + turn, mask=first, other=0.0)
        b1, b2 = b1 * re - b2 * im, b2 * re + b1 * im
        c1, c2 = c1 * re - c2 * im, c2 * re + c1 * im

    exact_x = tl.load(x + batch * x_batch + head * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    write = (delta * exact_x)[:, None]
    row = tl.program_id(0).to(tl.int64) * P + p
    at = row[:, None] * N + n[None, :]
    mask1 = (p < P)[:, None] & first[None, :]
    mask2 = (p < P)[:, None] & second[None, :]
    s1 = tl.load(state + at, mask=mask1, other=0.0).to(tl.float32) * decay + write * b1[None, :]
    s2 = tl.load(state + at + HALF, mask=mask2, other=0.0).to(tl.float32)
    s2 = s2 * decay + write * b2[None, :]
    tl.store(new_state + at, s1.to(new_state.dtype.element_ty), mask=mask1)
    tl.store(new_state + at + HALF, s2.to(new_state.dtype.element_ty), mask=mask2)
    read = tl.sum(s1 * c1[None, :] + s2 * c2[None, :], axis=1)
    if D is not None:
        read += tl.load(D + head).to(tl.float32) * exact_x
    tl.store(y + row, read.to(y.dtype.element_ty), mask=p < P)


@triton.jit
def _halves(b, first, second, HALF: tl.constexpr):
    low = tl.load(b, mask=first, other=0.0).to(tl.float32)
    return low, tl.load(b + HALF, mask=second, other=0.0).to(tl.float32)


@triton.jit
def _softplus(z):
    """max(z, 0) + log(1 + exp(-|z|)), to float32 precision also where exp(-|z|) is small."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e  # log1p(e) = e log(u) / (u - 1): u's rounding cancels
    log1p = tl.where(u == 1.0, e, e * tl.log(u) / (u - 1.0))
    return tl.maximum(z, 0.0) + log1p
