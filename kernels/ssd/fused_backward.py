"""Backward of the SSD scan in Triton: every chunk recomputes its decays, scores and rotations.

fused   one program for every row and head walks the chunks from the last to the first, the state's
        gradient in registers
split   gradients added by every chunk, a reverse pass over chunks, then all chunks at once

Both read the states that the forward kept, and leave the decays' gradients to a kernel of their
own, which needs four numbers a token: with r_t = c_t · dc_t and q_j = b_j · db_j, what reaches t
minus what leaves it is r_t - q_t, apart from the part of q that goes on to the chunk's end. What a
token writes and reads itself is in both and has no decay in it: it is kept out of r and q, because
where decays are fast it is all there is, and would leave only its rounding behind.
"""

import triton
import triton.language as tl

from kernels.ssd.fused_parts import (
    LOG2E,
    TINY_STEP,
    chunk_decay,
    chunk_documents,
    decay_matrix,
    load_rotated,
    load_rows,
    load_table,
    state_offsets,
    step_sizes,
    store_rows,
    store_unrotated,
)


@triton.jit
def scan_backward_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, states, dy, d_final,
    dx, dB, dC, reached, sent, leaving, own, through, dD, d_initial,
    length, chunks, zero,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr, B_ROW: tl.constexpr,
    C_ROW: tl.constexpr, DT_ROW: tl.constexpr, D_X_ROW: tl.constexpr, D_BC_ROW: tl.constexpr,
):  # fmt: skip
    """The fused shape. dB, dC [B, L, H, N] are per head, dD [B·H] is per row; the other sums are
    explained in `chunk_gradients` and `decay_gradient_kernel`."""
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // HEADS, tl.program_id(0) % HEADS
    whole = row_head * P * N + state_offsets(P, N)
    d_state = tl.load(d_final + whole) if d_final is not None else tl.zeros([P, N], tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    A_head = tl.load(A + head)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    sum_D = 0.0
    for k in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - (k ^ zero)
        slot = states + (row_head * chunks + chunk) * P * N
        part_D, carry, crossing, dys, c_gated = chunk_gradients(
            x, dt, A_head, B, C, table, bias, D, skip, documents, slot, None, d_state, dy,
            dx, dB, dC, reached, sent, leaving, own, row, head, chunk, length, zero,
            HEADS, GROUPS, P, N, Q, P, PRECISION, X_ROW, B_ROW, C_ROW, DT_ROW, D_X_ROW, D_BC_ROW,
        )  # fmt: skip
        tl.store(through + row_head * chunks + chunk, carry * crossing)
        sum_D += part_D
        d_state = tl.dot(tl.trans(dys), c_gated, d_state * carry, input_precision=PRECISION)
    if D is not None:
        tl.store(dD + row_head, sum_D)
    if d_initial is not None:
        tl.store(d_initial + whole, d_state)


@triton.jit
def chunk_backward_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, states, d_states, dy,
    dx, dB, dC, reached, sent, leaving, own, through, dD,
    length, chunks, zero,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr, B_ROW: tl.constexpr,
    C_ROW: tl.constexpr, DT_ROW: tl.constexpr, D_X_ROW: tl.constexpr, D_BC_ROW: tl.constexpr,
):  # fmt: skip
    """One chunk from the state that enters it and the gradient of the one that leaves it,
    [B·H, chunks, P, N] both; through, dD [B·H, chunks]."""
    chunk = tl.program_id(0)
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // HEADS, tl.program_id(1) % HEADS
    bias = tl.load(dt_bias + head).to(tl.float32)
    A_head = tl.load(A + head)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    at = row_head * chunks + chunk
    d_state = None
    if P_BLOCK == P:
        d_state = tl.load(d_states + at * P * N + state_offsets(P, N)).to(tl.float32)
    part_D, carry, crossing, _, _ = chunk_gradients(
        x, dt, A_head, B, C, table, bias, D, skip, documents,
        states + at * P * N, d_states + at * P * N, d_state, dy,
        dx, dB, dC, reached, sent, leaving, own, row, head, chunk, length, zero,
        HEADS, GROUPS, P, N, Q, P_BLOCK, PRECISION, X_ROW, B_ROW, C_ROW, DT_ROW, D_X_ROW, D_BC_ROW,
    )  # fmt: skip
    tl.store(through + at, carry * crossing)
    if D is not None:
        tl.store(dD + at, part_D)


@triton.jit
def chunk_gradients(
    x, dt, A_head, B, C, table, bias, D, skip, documents, entry, leaver, d_state, dy,
    dx, dB, dC, reached, sent, leaving, own, row, head, chunk, length, zero,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr, B_ROW: tl.constexpr,
    C_ROW: tl.constexpr, DT_ROW: tl.constexpr, D_X_ROW: tl.constexpr, D_BC_ROW: tl.constexpr,
):  # fmt: skip
    """Stores a chunk's dx, dB and dC, and four sums [B, L, H] in float32: reached = c · dc and
    sent = b · db without a token's own share, that share `own`, and leaving, the part of sent that
    goes on to the chunk's end. Returns its share of dD, the decay across it, Σ S ⊙ dS, and dy and
    u ⊙ c of the last block of P, whose product is what a block adds to the state's gradient.

    entry points to the state that enters, leaver to the gradient of the one that leaves, [P, N]
    each. One block of P at a time is in registers; where there are several, x, dy and leaver are
    read again for every product. With one, d_state [P, N] is that gradient, loaded already.
    Statements stand in the order in which tiles may leave the registers for shared memory.
    """
    SEVERAL: tl.constexpr = P_BLOCK < P
    i = tl.arange(0, Q)
    t0 = chunk * Q
    token = row * length + t0
    valid, log_delta, coarse, fine, document, gate, leave, carry = chunk_decay(
        dt, documents, token, head, t0, length, bias, A_head * LOG2E, DT_ROW, Q
    )
    cos, sin = load_table(table, token, valid, N, Q)
    ROPE: tl.constexpr = table is not None
    group = head // (HEADS // GROUPS)
    b_here, c_here = B + token * B_ROW + group * N, C + token * C_ROW + group * N
    b, _ = load_rotated(b_here, cos, sin, leave, valid, B_ROW, N, Q, ROPE)
    c, c_gated = load_rotated(c_here, cos, sin, gate, valid, C_ROW, N, Q, ROPE)
    at, x_at = (token * HEADS + head) * P, token * X_ROW + head * P
    xs = load_rows(x + x_at, valid, X_ROW, P_BLOCK, Q)
    dys = load_rows(dy + at, valid, HEADS * P, P_BLOCK, Q)
    per_token = token * HEADS + head + i * HEADS
    part_D = 0.0
    scores = tl.zeros([Q, Q], xs.dtype)
    dg = tl.zeros([Q, Q], xs.dtype)
    dg_own = tl.zeros([Q, Q], xs.dtype)
    if t0 >= zero:  # always; a block of its own keeps its tiles from being spread over the others
        w = decay_matrix(coarse, fine, log_delta, document, Q)
        weighted = tl.dot(c, tl.trans(b), input_precision=PRECISION) * w
        dw = tl.dot(dys, tl.trans(xs), input_precision=PRECISION)
        for p in tl.range(P_BLOCK, P, P_BLOCK, disable_licm=True):
            more = load_rows(dy + at + p, valid, HEADS * P, P_BLOCK, Q)
            x_more = load_rows(x + x_at + p, valid, X_ROW, P_BLOCK, Q)
            dw = tl.dot(more, tl.trans(x_more), dw, input_precision=PRECISION)
        diagonal = i[:, None] == i[None, :]
        tl.store(own + per_token, tl.sum(tl.where(diagonal, weighted * dw, 0.0), 1), mask=valid)
        if D is not None:
            part_D = tl.sum(tl.sum(tl.where(diagonal, dw, 0.0), 1), 0)
            weighted += tl.where(diagonal, skip, 0.0)
        scores = weighted.to(xs.dtype)
        dw *= w
        dg = tl.where(diagonal, 0.0, dw).to(xs.dtype)
        dg_own = tl.where(diagonal, dw, 0.0).to(xs.dtype)

    db = tl.zeros([N, Q], tl.float32)
    for p in tl.range(0, P, P_BLOCK, disable_licm=True):
        if SEVERAL:
            xs = load_rows(x + x_at + p, valid, X_ROW, P_BLOCK, Q)
            dys = load_rows(dy + at + p, valid, HEADS * P, P_BLOCK, Q)
            low = tl.load(leaver + p * N + state_offsets(P_BLOCK, N)).to(xs.dtype)
        else:
            low = d_state.to(xs.dtype)
        dxs = tl.dot(low, tl.trans(b), input_precision=PRECISION) * leave[None, :]  # [P, Q]
        dxs = tl.dot(tl.trans(dys), scores, dxs, input_precision=PRECISION)
        store_rows(dx + token * D_X_ROW + head * P + p, dxs, valid, D_X_ROW, P_BLOCK, Q)
        db = tl.dot(tl.trans(low), tl.trans(xs), db, input_precision=PRECISION)
    db *= leave[None, :]
    per_head = token * D_BC_ROW + head * N
    tl.store(leaving + per_token, tl.sum(tl.trans(db) * b, 1), mask=valid)
    db = tl.dot(tl.trans(c), dg, db, input_precision=PRECISION)
    tl.store(sent + per_token, tl.sum(tl.trans(db) * b, 1), mask=valid)
    db = tl.trans(tl.dot(tl.trans(c), dg_own, db, input_precision=PRECISION))
    # the table once more, so that it need not stay in registers until now
    cos, sin = load_table(table, token, valid, N, Q)
    store_unrotated(dB + per_head, db, cos, sin, valid, D_BC_ROW, N, Q, ROPE)
    crossing = 0.0
    dc = tl.zeros([N, Q], tl.float32)
    for p in tl.range(0, P, P_BLOCK, disable_licm=True):
        if SEVERAL:
            dys = load_rows(dy + at + p, valid, HEADS * P, P_BLOCK, Q)
            d_block = tl.load(leaver + p * N + state_offsets(P_BLOCK, N)).to(tl.float32)
        else:
            d_block = d_state
        state = tl.load(entry + p * N + state_offsets(P_BLOCK, N))
        crossing += tl.sum(tl.sum(state * d_block, 1), 0)
        dc = tl.dot(tl.trans(state), tl.trans(dys), dc, input_precision=PRECISION)
    dc *= gate[None, :]
    dc = tl.dot(tl.trans(b), tl.trans(dg), dc, input_precision=PRECISION)
    tl.store(reached + per_token, tl.sum(tl.trans(dc) * c, 1), mask=valid)
    dc = tl.trans(tl.dot(tl.trans(b), dg_own, dc, input_precision=PRECISION))
    store_unrotated(dC + per_head, dc, cos, sin, valid, D_BC_ROW, N, Q, ROPE)
    return part_D, carry, crossing, dys, c_gated


@triton.jit
def decay_gradient_kernel(
    dt, A, dt_bias, documents, reached, sent, leaving, own, through, ddt, dA, d_bias,
    length, chunks,
    HEADS: tl.constexpr, Q: tl.constexpr, DT_ROW: tl.constexpr, D_DT_ROW: tl.constexpr,
):  # fmt: skip
    """ddt [B, L, H] of one chunk and its share of dA and d_bias [B·H, chunks].

    reached, sent, leaving, own [B, L, H] from `chunk_gradients`; through [B·H, chunks]: the
    gradient of ln(decay) of a state carried across the whole chunk.
    """
    chunk = tl.program_id(0)
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // HEADS, tl.program_id(1) % HEADS
    i = tl.arange(0, Q)
    t0 = chunk * Q
    token = row * length + t0
    valid = i < length - t0
    bias = tl.load(dt_bias + head).to(tl.float32)
    rate = tl.load(A + head)
    z, delta, _ = step_sizes(dt + token * DT_ROW + head, bias, valid, DT_ROW, Q)
    document, _, _ = chunk_documents(documents + token, t0, length, Q)
    per_token = token * HEADS + head + i * HEADS
    sent_here = tl.load(sent + per_token, mask=valid, other=0.0)
    on = tl.load(leaving + per_token, mask=valid, other=0.0)
    inflow = tl.load(reached + per_token, mask=valid, other=0.0) - sent_here + on
    # a_t lies on every path that reaches t or a later token from an earlier one
    same = document[:, None] == document[None, :]
    d_a = tl.sum(tl.where(same & (i[:, None] >= i[None, :]), inflow[:, None], 0.0), 0)
    d_a += tl.sum(tl.where(same & (i[:, None] < i[None, :]), on[:, None], 0.0), 0)
    d_a += tl.load(through + row_head * chunks + chunk)
    sigmoid = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
    ratio = tl.where(z < TINY_STEP, 1.0, sigmoid / delta)  # d ln Δ / dz
    written = sent_here + tl.load(own + per_token, mask=valid, other=0.0)
    dz = tl.where(valid, written * ratio + d_a * rate * sigmoid, 0.0)
    tl.store(ddt + token * D_DT_ROW + head + i * D_DT_ROW, dz.to(ddt.dtype.element_ty), mask=valid)
    tl.store(dA + row_head * chunks + chunk, tl.sum(tl.where(valid, d_a * delta, 0.0)))
    tl.store(d_bias + row_head * chunks + chunk, tl.sum(dz))
