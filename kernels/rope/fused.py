"""The rotation in Triton: queries and keys in one launch, each element read and written once.

A program takes a few tokens, keeps their cos and sin in registers and walks over heads, first q's,
then k's, then v's, which are only copied: so the gradients of all three reach one buffer. Both
halves of a head are tiles of their own, so no element changes its thread.
"""

from collections.abc import Sequence
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from kernels.target import current_target

NUM_WARPS = 4
# 8 pairs a thread: one access of 128 bits for each half of 16-bit values, two of float32
TILE_PAIRS = NUM_WARPS * 32 * 8
# Programs an SM that keep enough bytes in flight; fewer than that, and heads are shared out too.
PROGRAMS_PER_SM = 8


def rotate(
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    conjugate: bool,
    copied: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Rotate one or two tensors [B, L, H, D], last dimension contiguous, by cos, sin [B, L, D/2].

    Into `out`, which may be `tensors`; conjugate: by -sin instead of sin. copied: another tensor of
    this kind, and where it is copied to as it is.
    """
    q, q_out = tensors[0], out[0]
    k, k_out = (tensors[1], out[1]) if len(tensors) == 2 else (q, q_out)
    v, v_out = copied or (q, q_out)
    batch, length, q_heads, dim = q.shape
    k_heads = k.shape[2] if len(tensors) == 2 else 0
    v_heads = v.shape[2] if copied else 0
    tokens, heads = batch * length, q_heads + k_heads + v_heads
    if tokens * heads == 0:
        return
    block_tokens, block_pairs = tile(dim)
    programs, heads_each = heads_per_program(tokens, heads, block_tokens, current_target().num_sms)
    rope_kernel[(programs, -(-heads // heads_each))](
        q, k, v, q_out, k_out, v_out, cos.contiguous(), sin.contiguous(),
        tokens, length, q_heads, k_heads, v_heads, heads_each,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *q_out.stride()[:3], *k_out.stride()[:3], *v_out.stride()[:3],
        HALF=dim // 2, BLOCK_TOKENS=block_tokens, BLOCK_PAIRS=block_pairs, CONJUGATE=conjugate,
        num_warps=NUM_WARPS,
    )  # fmt: skip


@lru_cache
def tile(dim: int) -> tuple[int, int]:
    """Tokens and pairs of a program's tile, the same for every architecture and dtype."""
    pairs = triton.next_power_of_2(dim // 2)
    return max(1, TILE_PAIRS // pairs), pairs


@lru_cache
def heads_per_program(tokens: int, heads: int, block_tokens: int, num_sms: int) -> tuple[int, int]:
    """Programs along tokens, and heads of each: all of them once tokens alone fill the GPU."""
    programs = -(-tokens // block_tokens)
    shares = min(heads, max(1, PROGRAMS_PER_SM * num_sms // programs))
    return programs, -(-heads // shares)


def traffic(tokens: int, heads: int, dim: int, itemsize: int, num_sms: int) -> tuple[int, int]:
    """Bytes loaded and stored by one rotation of `heads` heads in all, those that are copied among
    them; forward or backward."""
    block_tokens, _ = tile(dim)
    _, heads_each = heads_per_program(tokens, heads, block_tokens, num_sms)
    elements = tokens * heads * dim * itemsize
    tables = 2 * tokens * (dim // 2) * 4 * -(-heads // heads_each)
    return elements + tables, elements


@triton.jit
def rope_kernel(
    q, k, v, q_out, k_out, v_out, cos, sin,
    tokens, length, q_heads, k_heads, v_heads, heads_each,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    qo_batch, qo_token, qo_head, ko_batch, ko_token, ko_head, vo_batch, vo_token, vo_head,
    HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
    CONJUGATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    mask = (token < tokens)[:, None] & (pair < HALF)
    row, time = (token // length)[:, None], (token % length)[:, None]

    table = token[:, None] * HALF + pair
    c = tl.load(cos + table, mask=mask, other=0.0)
    s = tl.load(sin + table, mask=mask, other=0.0)
    if CONJUGATE:
        s = -s

    rotated = q_heads + k_heads
    first = tl.program_id(1) * heads_each
    last = tl.minimum(first + heads_each, rotated + v_heads)
    source = q + row * q_batch + time * q_token + pair
    target = q_out + row * qo_batch + time * qo_token + pair
    for head in range(first, tl.minimum(last, q_heads)):
        _rotate_head(source, target, head, q_head, qo_head, c, s, mask, HALF)
    source = k + row * k_batch + time * k_token + pair
    target = k_out + row * ko_batch + time * ko_token + pair
    for head in range(tl.maximum(first, q_heads) - q_heads, tl.minimum(last, rotated) - q_heads):
        _rotate_head(source, target, head, k_head, ko_head, c, s, mask, HALF)
    source = v + row * v_batch + time * v_token + pair
    target = v_out + row * vo_batch + time * vo_token + pair
    for head in range(tl.maximum(first, rotated) - rotated, last - rotated):
        _copy_head(source, target, head, v_head, vo_head, mask, HALF)


@triton.jit
def _rotate_head(source, target, head, stride, out_stride, c, s, mask, HALF: tl.constexpr):
    source += tl.cast(head, tl.int64) * stride
    target += tl.cast(head, tl.int64) * out_stride
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (x * c - y * s).to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (y * c + x * s).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _copy_head(source, target, head, stride, out_stride, mask, HALF: tl.constexpr):
    source += tl.cast(head, tl.int64) * stride
    target += tl.cast(head, tl.int64) * out_stride
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)
    tl.store(target + HALF, tl.load(source + HALF, mask=mask, other=0.0), mask=mask)
