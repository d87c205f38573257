"""Backward of the SSD scan in Triton: every chunk recomputes its decays, scores and rotations.

fused   one program for every row and head walks the chunks from the last to the first, the state's
        gradient in registers
split   gradients added by every chunk, a reverse pass over chunks, then all chunks at once

Both read the states that the forward kept. The decays' gradients need no sums over [Q, Q] tiles:
with r_t = c_t · dc_t and q_j = b_j · db_j, what reaches t minus what leaves it is r_t - q_t, apart
from the part of q that goes on to the chunk's end.
"""

import triton
import triton.language as tl

from kernels.ssd.fused_parts import (
    LOG2E,
    TINY_STEP,
    chunk_documents,
    decay_matrix,
    entry_gate,
    exit_weights,
    load_rotated,
    load_rows,
    load_table,
    running_sums,
    state_offsets,
    step_sizes,
    store_rows,
    store_unrotated,
)


@triton.jit
def scan_backward_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, states, dy, d_final,
    dx, ddt, dB, dC, dA, d_bias, dD, d_initial,
    length, chunks, zero,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The fused shape. dB, dC [B, L, H, N] are per head; dA, d_bias, dD [B·H] are per row."""
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // HEADS, tl.program_id(0) % HEADS
    whole = row_head * P * N + state_offsets(P, N)
    d_state = tl.load(d_final + whole) if d_final is not None else tl.zeros([P, N], tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    A_head = tl.load(A + head)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    sum_A, sum_bias, sum_D = 0.0, 0.0, 0.0
    for k in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - (k ^ zero)
        slot = states + (row_head * chunks + chunk) * P * N
        entry = tl.load(slot + state_offsets(P, N))
        crossing = tl.sum(tl.sum(entry * d_state, 1), 0)
        low = d_state.to(entry.dtype)
        part_A, part_bias, part_D, carry, dys, c_gated = chunk_gradients(
            x, dt, A_head, B, C, table, bias, D, skip, documents, dy, dx, ddt, dB, dC,
            entry, low, crossing, row, head, chunk, length,
            HEADS, GROUPS, P, N, Q, PRECISION,
        )  # fmt: skip
        sum_A += part_A
        sum_bias += part_bias
        sum_D += part_D
        d_state = tl.dot(tl.trans(dys), c_gated, d_state * carry, input_precision=PRECISION)
    tl.store(dA + row_head, sum_A)
    tl.store(d_bias + row_head, sum_bias)
    if D is not None:
        tl.store(dD + row_head, sum_D)
    if d_initial is not None:
        tl.store(d_initial + whole, d_state)


@triton.jit
def chunk_backward_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, states, d_states, dy,
    dx, ddt, dB, dC, dA, d_bias, dD,
    length, chunks,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk from the state that enters it and the gradient of the one that leaves it,
    [B·H, chunks, P, N] both; dA, d_bias, dD [B·H, chunks]."""
    chunk = tl.program_id(0)
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // HEADS, tl.program_id(1) % HEADS
    bias = tl.load(dt_bias + head).to(tl.float32)
    A_head = tl.load(A + head)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    slot = (row_head * chunks + chunk) * P * N + state_offsets(P, N)
    entry, low = tl.load(states + slot), tl.load(d_states + slot)
    crossing = tl.sum(tl.sum(entry.to(tl.float32) * low.to(tl.float32), 1), 0)
    part_A, part_bias, part_D, _carry, _dys, _c_gated = chunk_gradients(
        x, dt, A_head, B, C, table, bias, D, skip, documents, dy, dx, ddt, dB, dC,
        entry, low, crossing, row, head, chunk, length,
        HEADS, GROUPS, P, N, Q, PRECISION,
    )  # fmt: skip
    at = row_head * chunks + chunk
    tl.store(dA + at, part_A)
    tl.store(d_bias + at, part_bias)
    if D is not None:
        tl.store(dD + at, part_D)


@triton.jit
def chunk_gradients(
    x, dt, A_head, B, C, table, bias, D, skip, documents, dy, dx, ddt, dB, dC,
    entry, low, crossing, row, head, chunk, length,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores a chunk's dx, ddt, dB and dC; returns its share of dA, d_bias and dD, the decay across
    it, and dy and u ⊙ c, whose product it adds to the state's gradient.

    entry: the state S that enters, low: the gradient of the one that leaves, [P, N] in x's dtype;
    crossing: Σ S ⊙ dS.
    """
    i = tl.arange(0, Q)
    t0 = chunk * Q
    token = row * length + t0
    valid = i < length - t0
    z, delta, log_delta = step_sizes(dt + token * HEADS + head, bias, valid, HEADS, Q)
    document, before, end = chunk_documents(documents + token, t0, length, Q)
    coarse, fine, coarse_end, fine_end = running_sums(delta, A_head * LOG2E, valid, Q)
    gate = entry_gate(coarse, fine, document, before)
    leave = exit_weights(coarse, fine, coarse_end, fine_end, log_delta, document, end)
    carry = entry_gate(coarse_end, fine_end, end, before)

    at = (token * HEADS + head) * P
    xs = load_rows(x + at, valid, HEADS * P, P, Q)
    dys = load_rows(dy + at, valid, HEADS * P, P, Q)
    w = decay_matrix(coarse, fine, log_delta, document, Q)
    dw = tl.dot(dys, tl.trans(xs), input_precision=PRECISION)
    part_D = 0.0
    if D is not None:
        part_D = tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], dw, 0.0), 1), 0)
    dg = (dw * w).to(xs.dtype)

    ROPE: tl.constexpr = table is not None
    if ROPE:
        cos, sin = load_table(table + token * N, valid, N, Q)
    else:
        cos, sin = 0.0, 0.0
    here = (token * GROUPS + head // (HEADS // GROUPS)) * N
    b = load_rotated(B + here, cos, sin, valid, GROUPS * N, N, Q, ROPE)
    b_leaving = (b * leave[:, None]).to(b.dtype)
    c = load_rotated(C + here, cos, sin, valid, GROUPS * N, N, Q, ROPE)
    scores = tl.dot(c, tl.trans(b), input_precision=PRECISION) * w
    if D is not None:
        scores += tl.where(i[:, None] == i[None, :], skip, 0.0)
    scores = scores.to(xs.dtype)
    c_gated = (c * gate[:, None]).to(c.dtype)

    per_head = (token * HEADS + head) * N
    dc = tl.dot(tl.trans(entry), tl.trans(dys), input_precision=PRECISION) * gate[None, :]  # [N, Q]
    dc = tl.trans(tl.dot(tl.trans(b), tl.trans(dg), dc, input_precision=PRECISION))
    reached = tl.sum(dc * c, 1)
    store_unrotated(dC + per_head, dc, cos, sin, valid, HEADS * N, N, Q, ROPE)
    db = tl.dot(tl.trans(low), tl.trans(xs), input_precision=PRECISION) * leave[None, :]  # [N, Q]
    leaving = tl.sum(tl.trans(db) * b, 1)
    db = tl.trans(tl.dot(tl.trans(c), dg, db, input_precision=PRECISION))
    sent = tl.sum(db * b, 1)
    store_unrotated(dB + per_head, db, cos, sin, valid, HEADS * N, N, Q, ROPE)
    dxs = tl.dot(low, tl.trans(b_leaving), input_precision=PRECISION)  # [P, Q]
    dxs = tl.dot(tl.trans(dys), scores, dxs, input_precision=PRECISION)
    store_rows(dx + at, dxs, valid, HEADS * P, P, Q)

    # a_t lies on every path that reaches t or a later token from an earlier one
    same = document[:, None] == document[None, :]
    inflow = reached - sent + leaving
    d_a = tl.sum(tl.where(same & (i[:, None] >= i[None, :]), inflow[:, None], 0.0), 0)
    d_a += tl.sum(tl.where(same & (i[:, None] < i[None, :]), leaving[:, None], 0.0), 0)
    d_a += carry * crossing
    sigmoid = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
    ratio = tl.where(z < TINY_STEP, 1.0, sigmoid / delta)  # d ln Δ / dz
    dz = tl.where(valid, sent * ratio + d_a * A_head * sigmoid, 0.0)
    tl.store(ddt + token * HEADS + head + i * HEADS, dz.to(ddt.dtype.element_ty), mask=valid)
    part_A = tl.sum(tl.where(valid, d_a * delta, 0.0))
    return part_A, tl.sum(dz), part_D, carry, dys, c_gated
