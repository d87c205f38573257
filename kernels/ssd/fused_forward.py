"""Forward of the SSD scan in Triton, in the shapes of `kernels.ssd.shapes`.

fused      one program for every row, block of P and head (or two heads of a group) walks the
           chunks, the state in registers
segmented  rows are cut into segments. A first launch makes the outputs of the first segment and,
           of the others but the last, what they add to the state; a second one sums these up to
           the state that enters a segment and makes the outputs of all segments but the first
split      three launches: state increments of the chunks, a pass that sums them, the outputs

Nothing of size Q × Q and nothing rotated leaves a program. Products are oriented so that P or N are
their rows: with 8 warps, 64 rows would be computed twice.
"""

import triton
import triton.language as tl

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
    store_rows,
    weighted_rows,
)


@triton.jit
def scan_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, initial_state, y, states, final_state,
    exits, carries, length, chunks, segments, edge, middle, zero,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, PHASE: tl.constexpr, LOG_A: tl.constexpr,
    PRECISION: tl.constexpr, X_ROW: tl.constexpr, B_ROW: tl.constexpr, C_ROW: tl.constexpr,
    DT_ROW: tl.constexpr,
):  # fmt: skip
    """The fused shape (PHASE 0) and the two launches of the segmented one (1 and 2).

    states [B·H, chunks, P, N] (None: not kept) get the state at chunk entry. exits [B·H, segments -
    1, P, N] float32: the state after the first segment and what each next one adds to it; carries
    [B·H, segments - 1] float32: decay across a segment (of the first: not set). AT_ONCE heads of a
    group, 1 or 2, share what is loaded of B, C and table.
    """
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    PROGRAMS: tl.constexpr = (PER_GROUP + AT_ONCE - 1) // AT_ONCE  # of a group
    ROPE: tl.constexpr = table is not None
    program = tl.program_id(0)
    row, group = (program // (GROUPS * PROGRAMS)).to(tl.int64), program // PROGRAMS % GROUPS
    in_group = program % PROGRAMS * AT_ONCE
    head = group * PER_GROUP + in_group
    bias = tl.load(dt_bias + head).to(tl.float32)
    rate = head_rate(A, head, LOG_A)
    i = tl.arange(0, Q)
    tile = tl.program_id(1) * P_BLOCK * N + state_offsets(P_BLOCK, N)
    row_head = row * HEADS + head
    slots = segments - 1
    segment, first_chunk, stop = 0, 0, chunks
    if PHASE != 0:
        segment = tl.program_id(2) if PHASE == 1 else slots - tl.program_id(2)  # long ones first
        first_chunk, stop = segment_chunks(segment, segments, edge, middle, chunks)
    state = entry_state(initial_state, exits, carries, row_head, tile, segment, slots,
                        P, N, P_BLOCK, PHASE)  # fmt: skip
    other, next_head, next_bias, next_rate, next_length = state, head, bias, rate, length
    if AT_ONCE == 2:
        # where a group's heads are odd in number, the last program's second one is its first again,
        # of length 0: nothing is loaded or stored for it
        there = in_group + 1 < PER_GROUP
        next_head, next_length = tl.where(there, head + 1, head), tl.where(there, length, 0)
        next_bias = tl.load(dt_bias + next_head).to(tl.float32)
        next_rate = head_rate(A, next_head, LOG_A)
        other = entry_state(initial_state, exits, carries, row * HEADS + next_head, tile, segment,
                            slots, P, N, P_BLOCK, PHASE)  # fmt: skip
    if PHASE == 1 and segment > 0:
        passed, next_passed = 1.0, 1.0
        for k in tl.range(first_chunk, stop, disable_licm=True):
            t0 = (k ^ zero) * Q
            token = row * length + t0
            valid = i < length - t0
            document, before, end = chunk_documents(documents + token, t0, length, Q)
            cos, sin = load_table(table, token, valid, N, Q)
            b = load_rotated(B + token * B_ROW + group * N, cos, sin, valid, B_ROW, N, Q, ROPE)
            state, carry = added_state(x, dt, bias, rate, state, b, document, before, end, token,
                head, valid, P, Q, P_BLOCK, PRECISION, X_ROW, DT_ROW)  # fmt: skip
            passed *= carry
            if AT_ONCE == 2:
                other, carry = added_state(x, dt, next_bias, next_rate, other, b, document, before,
                    end, token, next_head, i < next_length - t0, P, Q, P_BLOCK, PRECISION,
                    X_ROW, DT_ROW)  # fmt: skip
                next_passed *= carry
        if tl.program_id(1) == 0:
            tl.store(carries + row_head * slots + segment, passed)
        if AT_ONCE == 2 and (tl.program_id(1) == 0) & (next_length > 0):
            tl.store(carries + (row * HEADS + next_head) * slots + segment, next_passed)
    else:
        for k in tl.range(first_chunk, stop, disable_licm=True):
            chunk = k ^ zero
            t0 = chunk * Q
            token = row * length + t0
            valid = i < length - t0
            document, before, end = chunk_documents(documents + token, t0, length, Q)
            cos, sin = load_table(table, token, valid, N, Q)
            c = load_rotated(C + token * C_ROW + group * N, cos, sin, valid, C_ROW, N, Q, ROPE)
            b = load_rotated(B + token * B_ROW + group * N, cos, sin, valid, B_ROW, N, Q, ROPE)
            products = tl.dot(c, tl.trans(b), input_precision=PRECISION)
            if states is not None:
                kept = states + (row_head * chunks + chunk) * P * N
                tl.store(kept + tile, state.to(states.dtype.element_ty))
            state = head_outputs(x, dt, D, y, bias, rate, state, products, b, c, document, before,
                end, token, head, valid, HEADS, P, Q, P_BLOCK, PRECISION, X_ROW,
                DT_ROW)  # fmt: skip
            if AT_ONCE == 2:
                if states is not None:
                    kept = states + ((row * HEADS + next_head) * chunks + chunk) * P * N
                    if next_length > 0:
                        tl.store(kept + tile, other.to(states.dtype.element_ty))
                other = head_outputs(x, dt, D, y, next_bias, next_rate, other, products, b, c,
                    document, before, end, token, next_head, i < next_length - t0, HEADS, P, Q,
                    P_BLOCK, PRECISION, X_ROW, DT_ROW)  # fmt: skip
    if PHASE == 1:
        tl.store(exits + (row_head * slots + segment) * P * N + tile, state)
        if AT_ONCE == 2:
            at = ((row * HEADS + next_head) * slots + segment) * P * N
            if next_length > 0:
                tl.store(exits + at + tile, other)
    if PHASE != 1 and segment == slots:
        tl.store(final_state + row_head * P * N + tile, state)
        if AT_ONCE == 2:
            at = (row * HEADS + next_head) * P * N
            if next_length > 0:
                tl.store(final_state + at + tile, other)


@triton.jit
def entry_state(
    initial_state, exits, carries, row_head, tile, segment, slots,
    P: tl.constexpr, N: tl.constexpr, P_BLOCK: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """The state that enters a segment [P_BLOCK, N]; in PHASE 1 zero but for the first segment."""
    if PHASE == 2:
        first = row_head * slots
        state = tl.load(exits + first * P * N + tile)
        for earlier in tl.range(1, segment):
            added = tl.load(exits + (first + earlier) * P * N + tile)
            state = state * tl.load(carries + first + earlier) + added
    elif initial_state is not None:
        state = tl.zeros([P_BLOCK, N], tl.float32)
        if segment == 0:
            state = tl.load(initial_state + row_head * P * N + tile)
    else:
        state = tl.zeros([P_BLOCK, N], tl.float32)
    return state


@triton.jit
def added_state(
    x, dt, bias, rate, state, b, document, before, end, token, head, valid,
    P: tl.constexpr, Q: tl.constexpr, P_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    X_ROW: tl.constexpr, DT_ROW: tl.constexpr,
):  # fmt: skip
    """The state after a chunk of a head, u_Q S + (w ⊙ x)ᵀ b, and u_Q."""
    _, _, _, _, _, _, leave, carry = head_decay(
        dt, token, head, valid, document, before, end, bias, rate, DT_ROW, Q
    )
    p0 = tl.program_id(1) * P_BLOCK
    xs = load_rows(x + token * X_ROW + head * P + p0, valid, X_ROW, P_BLOCK, Q)
    leaving = tl.trans(weighted_rows(xs, leave))
    return tl.dot(leaving, b, state * carry, input_precision=PRECISION), carry


@triton.jit
def head_outputs(
    x, dt, D, y, bias, rate, state, products, b, c, document, before, end, token, head, valid,
    HEADS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, P_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, X_ROW: tl.constexpr, DT_ROW: tl.constexpr,
):  # fmt: skip
    """Stores a chunk's outputs of a head; returns the state after it. products is c bᵀ."""
    _, _, log_delta, coarse, fine, gate, leave, carry = head_decay(
        dt, token, head, valid, document, before, end, bias, rate, DT_ROW, Q
    )
    p0 = tl.program_id(1) * P_BLOCK
    xs = load_rows(x + token * X_ROW + head * P + p0, valid, X_ROW, P_BLOCK, Q)
    leaving = tl.trans(weighted_rows(xs, leave))
    out = tl.dot(state.to(c.dtype), tl.trans(c), input_precision=PRECISION)  # [P, Q]
    out *= gate[None, :]
    scores = products * decay_matrix(coarse, fine, log_delta, document, Q)
    if D is not None:
        i, skip = tl.arange(0, Q), tl.load(D + head).to(tl.float32)
        scores += tl.where(i[:, None] == i[None, :], skip, 0.0)
    out = tl.dot(tl.trans(xs), tl.trans(scores.to(c.dtype)), out, input_precision=PRECISION)
    store_rows(y + (token * HEADS + head) * P + p0, out, valid, HEADS * P, P_BLOCK, Q)
    return tl.dot(leaving, b, state * carry, input_precision=PRECISION)


@triton.jit
def chunk_state_kernel(
    x, dt, A, B, table, dt_bias, documents, states, carries,
    length, chunks,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, WALKED: tl.constexpr, SPAN: tl.constexpr, GRADIENT: tl.constexpr,
    LOG_A: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr, B_ROW: tl.constexpr,
    DT_ROW: tl.constexpr,
):  # fmt: skip
    """What every chunk adds: (w ⊙ x)ᵀ b to the state; for GRADIENT, with dy and C as x and B,
    (u ⊙ dy)ᵀ c to the state's gradient. Also the decay across it, into `carries`.

    A program walks WALKED heads of a group. states [B·H, spans, P, N], carries [B·H, spans]: of
    SPAN chunks together, 2 for GRADIENT alone.
    """
    program = tl.program_id(1)
    row = (program // (HEADS // WALKED)).to(tl.int64)
    first_head = program % (HEADS // WALKED) * WALKED
    group = first_head // (HEADS // GROUPS)
    ROPE: tl.constexpr = table is not None
    i = tl.arange(0, Q)
    spans = (chunks + SPAN - 1) // SPAN
    t0 = tl.program_id(0) * SPAN * Q
    token = row * length + t0
    valid = i < length - t0
    document, before, end = chunk_documents(documents + token, t0, length, Q)
    cos, sin = load_table(table, token, valid, N, Q)
    b = load_rotated(B + token * B_ROW + group * N, cos, sin, valid, B_ROW, N, Q, ROPE)
    if SPAN == 2:
        next_token, next_valid, next_document, next_before, next_end, there = next_chunk(
            documents, row, t0, length, True, Q
        )
        cos, sin = load_table(table, next_token, next_valid, N, Q)
        next_b = load_rotated(B + next_token * B_ROW + group * N, cos, sin, next_valid, B_ROW, N, Q,
                              ROPE)  # fmt: skip
    for n in tl.range(0, WALKED, disable_licm=True):
        head = first_head + n
        bias = tl.load(dt_bias + head).to(tl.float32)
        rate = head_rate(A, head, LOG_A)
        _, _, _, _, _, gate, leave, carry = head_decay(
            dt, token, head, valid, document, before, end, bias, rate, DT_ROW, Q
        )
        at = (row * HEADS + head) * spans + tl.program_id(0)
        weight = gate if GRADIENT else leave
        if SPAN == 2:
            _, _, _, _, _, next_gate, _, next_carry = head_decay(
                dt, next_token, head, next_valid, next_document, next_before, next_end, bias, rate,
                DT_ROW, Q,
            )  # fmt: skip
        for p in tl.range(0, P, P_BLOCK, disable_licm=True):
            added = tl.zeros([P_BLOCK, N], tl.float32)
            if SPAN == 2:
                xs = load_rows(x + next_token * X_ROW + head * P + p, next_valid, X_ROW, P_BLOCK, Q)
                xs = tl.trans(weighted_rows(xs, next_gate))
                added = tl.dot(xs, next_b, input_precision=PRECISION) * carry
            xs = load_rows(x + token * X_ROW + head * P + p, valid, X_ROW, P_BLOCK, Q)
            xs = tl.trans(weighted_rows(xs, weight))
            added = tl.dot(xs, b, added, input_precision=PRECISION)
            slot = states + at * P * N + p * N + state_offsets(P_BLOCK, N)
            tl.store(slot, added.to(states.dtype.element_ty))
        if SPAN == 2:
            carry *= tl.where(there, next_carry, 1.0)
        tl.store(carries + at, carry)


@triton.jit
def chunk_output_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, states, y,
    length, chunks,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, WALKED: tl.constexpr, LOG_A: tl.constexpr, PRECISION: tl.constexpr,
    X_ROW: tl.constexpr, B_ROW: tl.constexpr, C_ROW: tl.constexpr, DT_ROW: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk of WALKED heads of a group from the state that reaches it,
    [B·H, chunks, P, N]."""
    chunk, program = tl.program_id(0), tl.program_id(1)
    row = (program // (HEADS // WALKED)).to(tl.int64)
    first_head = program % (HEADS // WALKED) * WALKED
    group = first_head // (HEADS // GROUPS)
    ROPE: tl.constexpr = table is not None
    i = tl.arange(0, Q)
    t0 = chunk * Q
    token = row * length + t0
    valid = i < length - t0
    document, before, end = chunk_documents(documents + token, t0, length, Q)
    cos, sin = load_table(table, token, valid, N, Q)
    c = load_rotated(C + token * C_ROW + group * N, cos, sin, valid, C_ROW, N, Q, ROPE)
    b = load_rotated(B + token * B_ROW + group * N, cos, sin, valid, B_ROW, N, Q, ROPE)
    products = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    for n in tl.range(0, WALKED, disable_licm=True):
        head = first_head + n
        bias = tl.load(dt_bias + head).to(tl.float32)
        rate = head_rate(A, head, LOG_A)
        _, _, log_delta, coarse, fine, gate, _, _ = head_decay(
            dt, token, head, valid, document, before, end, bias, rate, DT_ROW, Q
        )
        scores = products * decay_matrix(coarse, fine, log_delta, document, Q)
        if D is not None:
            scores += tl.where(i[:, None] == i[None, :], tl.load(D + head).to(tl.float32), 0.0)
        scores = scores.to(c.dtype)
        slot = states + ((row * HEADS + head) * chunks + chunk) * P * N
        here = x + token * X_ROW + head * P
        out_here = y + (token * HEADS + head) * P
        for p in tl.range(0, P, P_BLOCK, disable_licm=True):
            state = tl.load(slot + p * N + state_offsets(P_BLOCK, N))
            xs = load_rows(here + p, valid, X_ROW, P_BLOCK, Q)
            out = tl.dot(state, tl.trans(c), input_precision=PRECISION) * gate[None, :]  # [P, Q]
            out = tl.dot(tl.trans(xs), tl.trans(scores), out, input_precision=PRECISION)
            store_rows(out_here + p, out, valid, HEADS * P, P_BLOCK, Q)
