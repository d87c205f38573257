"""Forward of the SSD scan in Triton, in two shapes.

fused   one program for every row, head and block of P walks the chunks, the state in registers
split   states added by every chunk, a pass over chunks that accumulates them, outputs

Nothing of size Q × Q and nothing rotated leaves a program. Products are oriented so that P or N are
their rows: with 8 warps, 64 rows would be computed twice.
"""

import triton
import triton.language as tl

from kernels.ssd.fused_parts import (
    LOG2E,
    chunk_decay,
    decay_matrix,
    load_rotated,
    load_rows,
    load_table,
    state_offsets,
    store_rows,
)


@triton.jit
def scan_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, initial_state, y, states, final_state,
    length, chunks, zero,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr, B_ROW: tl.constexpr,
    C_ROW: tl.constexpr, DT_ROW: tl.constexpr,
):  # fmt: skip
    """The fused shape. states [B·H, chunks, P, N] (None: not kept) get the state at chunk entry."""
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // HEADS, tl.program_id(0) % HEADS
    group = head // (HEADS // GROUPS)
    p0 = tl.program_id(1) * P_BLOCK
    first = row * length
    bias = tl.load(dt_bias + head).to(tl.float32)
    rate = tl.load(A + head) * LOG2E
    ROPE: tl.constexpr = table is not None
    if initial_state is not None:
        state = tl.load(initial_state + (row_head * P + p0) * N + state_offsets(P_BLOCK, N))
    else:
        state = tl.zeros([P_BLOCK, N], tl.float32)
    for k in tl.range(0, chunks, disable_licm=True):
        t0 = (k ^ zero) * Q
        token = first + t0
        valid, log_delta, coarse, fine, document, gate, leave, carry = chunk_decay(
            dt, documents, token, head, t0, length, bias, rate, DT_ROW, Q
        )
        cos, sin = load_table(table, token, valid, N, Q)
        c_here, b_here = C + token * C_ROW + group * N, B + token * B_ROW + group * N
        c, c_gated = load_rotated(c_here, cos, sin, gate, valid, C_ROW, N, Q, ROPE)
        b, b_leaving = load_rotated(b_here, cos, sin, leave, valid, B_ROW, N, Q, ROPE)
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        scores *= decay_matrix(coarse, fine, log_delta, document, Q)
        if D is not None:
            i = tl.arange(0, Q)
            skip = tl.load(D + head).to(tl.float32)
            scores += tl.where(i[:, None] == i[None, :], skip, 0.0)
        scores = scores.to(c.dtype)

        xs = load_rows(x + token * X_ROW + head * P + p0, valid, X_ROW, P_BLOCK, Q)
        low = state.to(xs.dtype)
        if states is not None:
            slot = states + (row_head * chunks + (k ^ zero)) * P * N + p0 * N
            tl.store(slot + state_offsets(P_BLOCK, N), low)
        out = tl.dot(low, tl.trans(c_gated), input_precision=PRECISION)  # [P, Q]
        out = tl.dot(tl.trans(xs), tl.trans(scores), out, input_precision=PRECISION)
        at = (token * HEADS + head) * P + p0
        store_rows(y + at, out, valid, HEADS * P, P_BLOCK, Q)
        state = tl.dot(tl.trans(xs), b_leaving, state * carry, input_precision=PRECISION)
    tl.store(final_state + (row_head * P + p0) * N + state_offsets(P_BLOCK, N), state)


@triton.jit
def chunk_state_kernel(
    x, dt, A, B, table, dt_bias, documents, states, carries,
    length, chunks,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr,
    B_ROW: tl.constexpr, DT_ROW: tl.constexpr,
):  # fmt: skip
    """What every chunk adds: (w ⊙ x)ᵀ b to the state; for GRADIENT, with dy and C as x and B,
    (u ⊙ dy)ᵀ c to the state's gradient. Also u of the chunk's last token, into `carries`."""
    chunk = tl.program_id(0)
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // HEADS, tl.program_id(1) % HEADS
    group = head // (HEADS // GROUPS)
    t0 = chunk * Q
    token = row * length + t0
    bias = tl.load(dt_bias + head).to(tl.float32)
    rate = tl.load(A + head) * LOG2E
    valid, _log_delta, _coarse, _fine, _document, gate, leave, carry = chunk_decay(
        dt, documents, token, head, t0, length, bias, rate, DT_ROW, Q
    )
    tl.store(carries + row_head * chunks + chunk, carry)
    cos, sin = load_table(table, token, valid, N, Q)
    ROPE: tl.constexpr = table is not None
    here = token * B_ROW + group * N
    weight = gate if GRADIENT else leave
    _, b = load_rotated(B + here, cos, sin, weight, valid, B_ROW, N, Q, ROPE)
    at = token * X_ROW + head * P
    slot = states + (row_head * chunks + chunk) * P * N
    for p in tl.range(0, P, P_BLOCK, disable_licm=True):
        xs = load_rows(x + at + p, valid, X_ROW, P_BLOCK, Q)
        added = tl.dot(tl.trans(xs), b, input_precision=PRECISION)  # [P, N]
        tl.store(slot + p * N + state_offsets(P_BLOCK, N), added.to(states.dtype.element_ty))


@triton.jit
def chunk_output_kernel(
    x, dt, A, B, C, table, dt_bias, D, documents, states, y,
    length, chunks,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    P_BLOCK: tl.constexpr, PRECISION: tl.constexpr, X_ROW: tl.constexpr, B_ROW: tl.constexpr,
    C_ROW: tl.constexpr, DT_ROW: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk from the state that reaches it, [B·H, chunks, P, N]."""
    chunk = tl.program_id(0)
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // HEADS, tl.program_id(1) % HEADS
    group = head // (HEADS // GROUPS)
    t0 = chunk * Q
    token = row * length + t0
    bias = tl.load(dt_bias + head).to(tl.float32)
    rate = tl.load(A + head) * LOG2E
    valid, log_delta, coarse, fine, document, gate, leave, _carry = chunk_decay(
        dt, documents, token, head, t0, length, bias, rate, DT_ROW, Q
    )
    cos, sin = load_table(table, token, valid, N, Q)
    ROPE: tl.constexpr = table is not None
    c_here, b_here = C + token * C_ROW + group * N, B + token * B_ROW + group * N
    c, c_gated = load_rotated(c_here, cos, sin, gate, valid, C_ROW, N, Q, ROPE)
    b, _ = load_rotated(b_here, cos, sin, leave, valid, B_ROW, N, Q, ROPE)
    scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    scores *= decay_matrix(coarse, fine, log_delta, document, Q)
    if D is not None:
        i = tl.arange(0, Q)
        scores += tl.where(i[:, None] == i[None, :], tl.load(D + head).to(tl.float32), 0.0)
    scores = scores.to(c.dtype)
    slot = states + (row_head * chunks + chunk) * P * N
    at = (token * HEADS + head) * P
    x += token * X_ROW + head * P
    for p in tl.range(0, P, P_BLOCK, disable_licm=True):
        state = tl.load(slot + p * N + state_offsets(P_BLOCK, N))
        xs = load_rows(x + p, valid, X_ROW, P_BLOCK, Q)
        out = tl.dot(state, tl.trans(c_gated), input_precision=PRECISION)  # [P, Q]
        out = tl.dot(tl.trans(xs), tl.trans(scores), out, input_precision=PRECISION)
        store_rows(y + at + p, out, valid, HEADS * P, P_BLOCK, Q)
