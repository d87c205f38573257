"""Backward of the SSD scan in Triton: every chunk recomputes its decays, scores and rotations.

fused      one program for every row and head walks the chunks from the last to the first, the
           state's gradient in registers
segmented  as forward, from the last segment: a first launch makes the gradients of the last segment
           and what the others but the first add to the state's gradient, a second one all others
split      three launches: state gradients of single chunks (or pairs), a reverse pass that sums
           them, then all chunks; a program walks the heads of a group and sums dB and dC

All read the states that the forward kept. The gradient of a decay step needs numbers a token: what
reaches token t from earlier ones minus what t sends on, Σ_j E_tj - Σ_j E_jt inside the chunk with
E = dW ⊙ W ⊙ (c bᵀ), and what comes from the state at entry and goes on to the state at exit. What a
token writes and reads itself, E's diagonal, is in both and has no decay in it: it is kept out of
them, because where decays are fast it is all there is, and would leave only its rounding behind.
"""

import triton
import triton.language as tl

from kernels.ssd.fused_forward import entry_state
from kernels.ssd.fused_parts import (
    chunk_documents,
    decay_matrix,
    head_decay,
    head_rate,
    load_rotated,
    load_rows,
    load_table,
    next_chunk,
    segment_chunks,
    state_offsets,
    step_size_slopes,
    step_sizes,
    store_rows,
    store_unrotated,
    weighted_rows,
)


@triton.jit
def scan_backward_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, states, dy, d_final,
    dx, dB, dC, ddt, dA, d_bias, dD, d_initial, exits, carries,
    length, chunks, segments, edge, middle, zero,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PHASE: tl.constexpr,
    LOG_A: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr, B_ROW: tl.constexpr,
    C_ROW: tl.constexpr, DT_ROW: tl.constexpr, D_X_ROW: tl.constexpr, D_BC_ROW: tl.constexpr,
    D_DT_ROW: tl.constexpr,
):  # fmt: skip
    """The fused shape (PHASE 0) and the two launches of the segmented one (1 and 2); each head has
    B and C of its own.

    dA, d_bias, dD [B·H, chunks] float32. exits [B·H, segments - 1, P, N] float32: the state's
    gradient at the last segment's entry and what each earlier one adds to it, the last first;
    carries [B·H, segments - 1] float32: decay across a segment (of the last: not set).
    """
    row, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    row_head = row * HEADS + head
    bias = tl.load(dt_bias + head).to(tl.float32)
    rate = head_rate(A, head, LOG_A)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    whole = state_offsets(P, N)
    slots = segments - 1
    reverse, first_chunk, stop = 0, 0, chunks  # reverse: the segment's number from the end
    if PHASE != 0:
        # long ones first
        reverse = tl.program_id(1) if PHASE == 1 else slots - tl.program_id(1)
        first_chunk, stop = segment_chunks(slots - reverse, segments, edge, middle, chunks)
    count = stop - first_chunk
    d_state = entry_state(d_final, exits, carries, row_head, whole, reverse, slots, P, N, P, PHASE)
    if PHASE == 1 and reverse > 0:
        passed = 1.0
        for k in tl.range(0, count, disable_licm=True):
            t0 = (stop - 1 - (k ^ zero)) * Q
            token = row * length + t0
            valid = tl.arange(0, Q) < length - t0
            document, before, end = chunk_documents(documents + token, t0, length, Q)
            cos, sin = load_table(table, token, valid, N, Q)
            c = load_rotated(C + token * C_ROW + head * N, cos, sin, valid, C_ROW, N, Q,
                             table is not None)  # fmt: skip
            _, _, _, _, _, gate, _, carry = head_decay(
                dt, token, head, valid, document, before, end, bias, rate, DT_ROW, Q
            )
            dys = load_rows(dy + (token * HEADS + head) * P, valid, HEADS * P, P, Q)
            gated = tl.trans(weighted_rows(dys, gate))
            d_state = tl.dot(gated, c, d_state * carry, input_precision=PRECISION)
            passed *= carry
        tl.store(carries + row_head * slots + reverse, passed)
    else:
        for k in tl.range(0, count, disable_licm=True):
            chunk = stop - 1 - (k ^ zero)
            t0 = chunk * Q
            token = row * length + t0
            valid = tl.arange(0, Q) < length - t0
            document, before, end = chunk_documents(documents + token, t0, length, Q)
            cos, sin = load_table(table, token, valid, N, Q)
            ROPE: tl.constexpr = table is not None
            b = load_rotated(B + token * B_ROW + head * N, cos, sin, valid, B_ROW, N, Q, ROPE)
            c = load_rotated(C + token * C_ROW + head * N, cos, sin, valid, C_ROW, N, Q, ROPE)
            at = row_head * chunks + chunk
            carry, gated, _, _ = head_gradients(
                x, dt, table, D, states + at * P * N, None, d_state, dy, dx, dB, dC, ddt, dA,
                d_bias, dD, bias, rate, skip, b, c, None, None, document, before, end, row, head,
                head, at, t0, length, valid, zero, HEADS, P, N, Q, P, False, PRECISION, X_ROW,
                DT_ROW, D_X_ROW, D_BC_ROW, D_DT_ROW,
            )  # fmt: skip
            d_state = tl.dot(tl.trans(gated), c, d_state * carry, input_precision=PRECISION)
    if PHASE == 1:
        tl.store(exits + (row_head * slots + reverse) * P * N + whole, d_state)
    if PHASE != 1 and d_initial is not None and reverse == slots:
        tl.store(d_initial + row_head * P * N + whole, d_state)


@triton.jit
def chunk_backward_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, states, d_states, dy,
    dx, dB, dC, ddt, dA, d_bias, dD,
    length, chunks, zero,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, SPAN: tl.constexpr, LOG_A: tl.constexpr, PRECISION: tl.constexpr,
    X_ROW: tl.constexpr, B_ROW: tl.constexpr, C_ROW: tl.constexpr, DT_ROW: tl.constexpr,
    D_X_ROW: tl.constexpr, D_BC_ROW: tl.constexpr, D_DT_ROW: tl.constexpr,
):  # fmt: skip
    """One chunk of a group's heads from the state that enters it [B·H, chunks, P, N] and the
    gradient of the one that leaves its span of SPAN chunks, 1 or 2, [B·H, spans, P, N]; dA, d_bias,
    dD [B·H, chunks] float32."""
    chunk = tl.program_id(0)
    row, group = (tl.program_id(1) // GROUPS).to(tl.int64), tl.program_id(1) % GROUPS
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    SHARED: tl.constexpr = GROUPS < HEADS
    ROPE: tl.constexpr = table is not None
    i = tl.arange(0, Q)
    t0 = chunk * Q
    token = row * length + t0
    if SPAN == 2:
        next_token, next_valid, next_document, next_before, next_end, there = next_chunk(
            documents, row, t0, length, chunk % 2 == 0, Q
        )
        cos, sin = load_table(table, next_token, next_valid, N, Q)
        next_c = load_rotated(C + next_token * C_ROW + group * N, cos, sin, next_valid, C_ROW, N, Q,
                              ROPE)  # fmt: skip
    valid = i < length - t0
    document, before, end = chunk_documents(documents + token, t0, length, Q)
    cos, sin = load_table(table, token, valid, N, Q)
    b = load_rotated(B + token * B_ROW + group * N, cos, sin, valid, B_ROW, N, Q, ROPE)
    c = load_rotated(C + token * C_ROW + group * N, cos, sin, valid, C_ROW, N, Q, ROPE)
    spans = (chunks + SPAN - 1) // SPAN
    db = tl.zeros([N, Q], tl.float32)
    dc = tl.zeros([N, Q], tl.float32)
    for n in tl.range(0, PER_GROUP, disable_licm=True):
        head = group * PER_GROUP + n
        bias = tl.load(dt_bias + head).to(tl.float32)
        rate = head_rate(A, head, LOG_A)
        skip = 0.0
        if D is not None:
            skip = tl.load(D + head).to(tl.float32)
        at = (row * HEADS + head) * chunks + chunk
        leaver = d_states + ((row * HEADS + head) * spans + chunk // SPAN) * P * N
        d_state = None
        if P_BLOCK == P:
            d_state = tl.load(leaver + state_offsets(P, N)).to(tl.float32)
        if SPAN == 2:
            _, _, _, _, _, gate, _, carry = head_decay(
                dt, next_token, head, next_valid, next_document, next_before, next_end, bias, rate,
                DT_ROW, Q,
            )  # fmt: skip
            dys = load_rows(dy + (next_token * HEADS + head) * P, next_valid, HEADS * P, P, Q)
            d_state *= tl.where(there, carry, 1.0)
            gated = tl.trans(weighted_rows(dys, gate))
            d_state = tl.dot(gated, next_c, d_state, input_precision=PRECISION)
        _, _, db, dc = head_gradients(
            x, dt, table, D, states + at * P * N, leaver, d_state, dy, dx, dB, dC, ddt, dA, d_bias,
            dD, bias, rate, skip, b, c, db, dc, document, before, end, row, head, group, at, t0,
            length, valid, zero, HEADS, P, N, Q, P_BLOCK, SHARED, PRECISION, X_ROW, DT_ROW, D_X_ROW,
            D_BC_ROW, D_DT_ROW,
        )  # fmt: skip
    if SHARED:
        cos, sin = load_table(table, token, valid, N, Q)
        at = token * D_BC_ROW + group * N
        store_unrotated(dB + at, tl.trans(db), cos, sin, valid, D_BC_ROW, N, Q, ROPE)
        store_unrotated(dC + at, tl.trans(dc), cos, sin, valid, D_BC_ROW, N, Q, ROPE)


@triton.jit
def head_gradients(
    x, dt, table, D, entry, leaver, d_state, dy, dx, dB, dC, ddt, dA, d_bias, dD, bias, rate, skip,
    b, c, sum_b, sum_c, document, before, end, row, head, group, part, t0, length, valid, zero,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, P_BLOCK: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr, DT_ROW: tl.constexpr,
    D_X_ROW: tl.constexpr, D_BC_ROW: tl.constexpr, D_DT_ROW: tl.constexpr,
):  # fmt: skip
    """Stores a chunk's dx and ddt of a head and its share of dA, d_bias and dD, at `part` of these;
    also dB and dC unless SHARED, where they are added to sum_b and sum_c [N, Q]. Returns the decay
    across it, u ⊙ dy of the last block of P, whose product with c is what a block adds to the
    state's gradient, sum_b and sum_c.

    entry points to the state that enters, leaver to the gradient of the one that leaves, [P, N]
    each. One block of P at a time is in registers; where there are several, x, dy and leaver are
    read again for every product. With one, d_state [P, N] is that gradient, loaded already.
    Statements stand in the order in which tiles may leave the registers for shared memory.
    """
    SEVERAL: tl.constexpr = P_BLOCK < P
    ROPE: tl.constexpr = table is not None
    i = tl.arange(0, Q)
    token = row * length + t0
    _, _, log_delta, coarse, fine, gate, leave, carry = head_decay(
        dt, token, head, valid, document, before, end, bias, rate, DT_ROW, Q
    )
    at, x_at = (token * HEADS + head) * P, token * X_ROW + head * P
    xs = load_rows(x + x_at, valid, X_ROW, P_BLOCK, Q)
    dys = load_rows(dy + at, valid, HEADS * P, P_BLOCK, Q)
    scores = tl.zeros([Q, Q], xs.dtype)
    dg = tl.zeros([Q, Q], xs.dtype)
    flow = tl.zeros([Q], tl.float32)  # what reaches a token minus what leaves it, in the chunk
    written = tl.zeros([Q], tl.float32)  # what leaves it, and what it reads itself
    if t0 >= zero:  # always; a block of its own keeps its tiles from being spread over the others
        w = decay_matrix(coarse, fine, log_delta, document, Q)
        weighted = tl.dot(c, tl.trans(b), input_precision=PRECISION) * w
        dw = tl.dot(dys, tl.trans(xs), input_precision=PRECISION)
        for p in tl.range(P_BLOCK, P, P_BLOCK, disable_licm=True):
            more = load_rows(dy + at + p, valid, HEADS * P, P_BLOCK, Q)
            x_more = load_rows(x + x_at + p, valid, X_ROW, P_BLOCK, Q)
            dw = tl.dot(more, tl.trans(x_more), dw, input_precision=PRECISION)
        diagonal = i[:, None] == i[None, :]
        e = weighted * dw
        if D is not None:
            tl.store(dD + part, tl.sum(tl.sum(tl.where(diagonal, dw, 0.0), 1), 0))
            weighted += tl.where(diagonal, skip, 0.0)
        scores = weighted.to(xs.dtype)
        dg = (dw * w).to(xs.dtype)
        written = tl.sum(e, 0)
        e = tl.where(diagonal, 0.0, e)
        flow = tl.sum(e, 1) - tl.sum(e, 0)

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
    leaving = tl.sum(tl.trans(db) * b, 1)  # what goes on to the chunk's end
    written += leaving
    through = document_sums(leaving, document, False) - leaving
    db = tl.dot(tl.trans(c), dg, db, input_precision=PRECISION)
    if SHARED:
        sum_b += db
    else:
        # the table once more, so that it need not stay in registers until now
        cos, sin = load_table(table, token, valid, N, Q)
        out = dB + token * D_BC_ROW + group * N
        store_unrotated(out, tl.trans(db), cos, sin, valid, D_BC_ROW, N, Q, ROPE)
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
    flow += tl.sum(tl.trans(dc) * c, 1)
    dc = tl.dot(tl.trans(b), tl.trans(dg), dc, input_precision=PRECISION)
    if SHARED:
        sum_c += dc
    else:
        out = dC + token * D_BC_ROW + group * N
        store_unrotated(out, tl.trans(dc), cos, sin, valid, D_BC_ROW, N, Q, ROPE)

    gated = weighted_rows(dys, gate)
    # a step lies on every path that reaches its token or a later one from an earlier one
    through += document_sums(flow, document, True) + carry * crossing
    # step sizes once more, for the same reason as the table
    z, delta, _ = step_sizes(dt + token * DT_ROW + head, bias, valid, DT_ROW, Q)
    d_step = tl.where(valid, through, 0.0)
    sigmoid, ratio = step_size_slopes(z, delta)
    dz = tl.where(valid, written * ratio + d_step * rate * sigmoid, 0.0)
    d_dt = ddt + token * D_DT_ROW + head + i * D_DT_ROW
    tl.store(d_dt, dz.to(ddt.dtype.element_ty), mask=valid)
    tl.store(dA + part, tl.sum(d_step * delta))
    tl.store(d_bias + part, tl.sum(dz))
    return carry, gated, sum_b, sum_c


@triton.jit
def document_sums(values, document, REVERSE: tl.constexpr):
    """Running sums [Q] that restart at every document."""
    sums, _last = tl.associative_scan((values, document), 0, sum_in_document, reverse=REVERSE)
    return sums


@triton.jit
def sum_in_document(sums, sums_document, value, document):
    """Of two neighbouring ranges of tokens: the sum at the second one's end."""
    return tl.where(sums_document == document, sums + value, value), document


@triton.jit
def vector_gradient_kernel(
    A, dA, d_bias, dD, A_out, bias_out, D_out, rows, parts,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, LOG_A: tl.constexpr,
):  # fmt: skip
    """Sums of dA, d_bias and dD [rows·H, parts] float32 over rows and parts, [H] each in their
    tensor's dtype; with LOG_A of log(-A): dA times A."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    sum_A = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    sum_D = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(0, rows):
        first = (row * HEADS + head) * parts
        for part in tl.range(0, parts, BLOCK):
            here, valid = first + part + i, part + i < parts
            sum_A += tl.load(dA + here, mask=valid, other=0.0)
            sum_bias += tl.load(d_bias + here, mask=valid, other=0.0)
            if D_out is not None:
                sum_D += tl.load(dD + here, mask=valid, other=0.0)
    total = tl.sum(sum_A)
    if LOG_A:
        total *= head_rate(A, head, LOG_A)
    tl.store(A_out + head, total.to(A_out.dtype.element_ty))
    tl.store(bias_out + head, tl.sum(sum_bias).to(bias_out.dtype.element_ty))
    if D_out is not None:
        tl.store(D_out + head, tl.sum(sum_D).to(D_out.dtype.element_ty))
