"""What the SSD kernels in Triton share: one chunk's decays, rotation in registers, pointers.

Notation of `kernels.ssd.chunked`; in a [Q, Q] tile rows are t, columns j. Exponents are to base 2.

A chunk's steps a_t are rounded to multiples of Q/65536 (`coarse`) and what is left to multiples of
2^-29 (`fine`). Running sums of both are exact in float32, whatever their order, and so are their
differences: nothing cancels where decays are large, and no document leaves a rounding behind for
its neighbour.

Loops over chunks are written for the register file: `disable_licm`, because hoisted shared-memory
addresses would fill it; chunk numbers go through `k ^ zero`, where `zero` is an argument that is 0,
because LLVM would otherwise keep a 64-bit pointer alive for every access; head counts are
constants of the compilation, so that offsets are, and so are the elements from a token to the next
one: X_ROW, B_ROW, C_ROW and DT_ROW of the inputs, D_X_ROW, D_BC_ROW and D_DT_ROW of gradients.
"""

import triton
import triton.language as tl

# Constants are functions or locals: Triton compares a kernel's global ones at every launch, which
# is a tenth of what the host does for a layer.


@triton.jit
def log2e():
    """log2(e), which makes exponents of exp2 of those of exp."""
    return 1.4426950408889634


@triton.jit
def is_tiny(z):
    """Whether ln softplus(z) = z in float32, also where softplus itself underflows."""
    return z < -17.0


@triton.jit
def step_sizes(dt, dt_bias, valid, DT_ROW: tl.constexpr, Q: tl.constexpr):
    """z, Δ = softplus(z) and log2 Δ of a chunk, [Q] each; log2 Δ = -inf past the row's end."""
    z = tl.load(dt + tl.arange(0, Q) * DT_ROW, mask=valid, other=0.0).to(tl.float32) + dt_bias
    e = tl.exp2(-tl.abs(z) * log2e())
    u = 1.0 + e
    # log1p(e), exact to rounding (Kahan): the error of 1 + e cancels in log(u) / (u - 1)
    log1p = tl.where(u == 1.0, e, tl.log2(u) / log2e() * (e / (u - 1.0)))
    delta = tl.maximum(z, 0.0) + log1p
    log_delta = tl.where(is_tiny(z), z * log2e(), tl.log2(delta))
    return z, delta, tl.where(valid, log_delta, -float("inf"))


@triton.jit
def step_size_slopes(z, delta):
    """dΔ/dz and d ln Δ / dz of step sizes Δ = softplus(z)."""
    sigmoid = 1.0 / (1.0 + tl.exp2(-z * log2e()))
    return sigmoid, tl.where(is_tiny(z), 1.0, sigmoid / delta)


@triton.jit
def running_sums(delta, rate, valid, Q: tl.constexpr):
    """coarse and fine running sums [Q] of a = Δ·rate, and their totals; rate is A·log2(e)."""
    FLOOR: tl.constexpr = -256.0  # exp2 of this is 0 in float32, and so is that of anything below
    FINE: tl.constexpr = 536870912.0
    a = tl.maximum(delta * rate, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    a = tl.where(valid, a, 0.0)
    GRID: tl.constexpr = 65536 // Q
    coarse = tl.floor(a * GRID + 0.5) / GRID
    fine = tl.floor((a - coarse) * FINE + 0.5) / FINE
    return tl.cumsum(coarse), tl.cumsum(fine), tl.sum(coarse), tl.sum(fine)


@triton.jit
def chunk_documents(documents, t0, length, Q: tl.constexpr):
    """Document ids of a chunk's tokens [Q], of the token before it and of its last token.

    `documents` points to the chunk's first token. Past the row's end the last id goes on; at the
    row's start the row's first token stands for the one before, which lets an initial state in.
    """
    last = tl.minimum(Q, length - t0) - 1
    document = tl.load(documents + tl.minimum(tl.arange(0, Q), last))
    return document, tl.load(documents - (t0 > 0).to(tl.int32)), tl.load(documents + last)


@triton.jit
def next_chunk(documents, row, t0, length, first, Q: tl.constexpr):
    """The chunk after the one at t0: its first token, valid, `chunk_documents`, whether it is read.

    Read only where `first`, of a pair, and where the row has it; else it stands for nothing: no
    token is valid, and what is pointed to is the chunk at t0.
    """
    there = first & (t0 + Q < length)
    start = tl.where(there, t0 + Q, t0)
    valid = tl.arange(0, Q) < tl.where(there, length - start, 0)
    token = row * length + start
    document, before, end = chunk_documents(documents + token, start, length, Q)
    return token, valid, document, before, end, there


@triton.jit
def decay_matrix(coarse, fine, log_delta, document, Q: tl.constexpr):
    """W_tj = exp2(s_t - s_j + log2 Δ_j) for j ≤ t in t's document, else 0: [Q, Q]."""
    i = tl.arange(0, Q)
    within = (i[:, None] >= i[None, :]) & (document[:, None] == document[None, :])
    # differences first: they are exact, and free of what came before both
    exponent = (fine[:, None] - fine[None, :]) + log_delta[None, :]
    exponent += coarse[:, None] - coarse[None, :]
    return tl.exp2(tl.where(within, exponent, -float("inf")))


@triton.jit
def entry_gate(coarse, fine, document, before):
    """u_t = exp2(s_t) where t's document began before the chunk, else 0."""
    return tl.where(document == before, tl.exp2(coarse + fine), 0.0)


@triton.jit
def head_rate(A, head, LOG_A: tl.constexpr):
    """A of one head, negative; with LOG_A the tensor holds log(-A)."""
    rate = tl.load(A + head).to(tl.float32)
    if LOG_A:
        rate = -tl.exp2(rate * log2e())
    return rate


@triton.jit
def head_decay(
    dt, token, head, valid, document, before, end, dt_bias, rate, DT_ROW: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """Decays of one head over the chunk whose first token is `token`, [Q] each.

    document, before and end are of `chunk_documents`, rate is A.

    Returns z, Δ, log2 Δ, the running sums coarse and fine, u, w (w_j = exp2(s_end - s_j + log2 Δ_j)
    where j's document goes on to the chunk's end, else 0) and the decay across the chunk, a scalar.
    """
    z, delta, log_delta = step_sizes(dt + token * DT_ROW + head, dt_bias, valid, DT_ROW, Q)
    coarse, fine, coarse_end, fine_end = running_sums(delta, rate * log2e(), valid, Q)
    gate = entry_gate(coarse, fine, document, before)
    exponent = (coarse_end - coarse) + ((fine_end - fine) + log_delta)
    leave = tl.exp2(tl.where(document == end, exponent, -float("inf")))
    carry = entry_gate(coarse_end, fine_end, end, before)
    return z, delta, log_delta, coarse, fine, gate, leave, carry


@triton.jit
def load_table(table, token, valid, N: tl.constexpr, Q: tl.constexpr):
    """cos and sin [Q, N/2] of a chunk, from rows [cos | sin]; without table, nothing of use."""
    cos, sin = 0.0, 0.0
    if table is not None:
        offsets = token * N + tl.arange(0, Q)[:, None] * N + tl.arange(0, N // 2)[None, :]
        cos = tl.load(table + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
        sin = tl.load(table + N // 2 + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def load_rotated(b, cos, sin, valid, STRIDE: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
                 ROPE: tl.constexpr):  # fmt: skip
    """RoPE(b) [Q, N] of rows STRIDE apart.

    Halves are loaded apart, so that rotation stays in a thread.
    """
    offsets = tl.arange(0, Q)[:, None] * STRIDE + tl.arange(0, N // 2)[None, :]
    first = tl.load(b + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
    second = tl.load(b + N // 2 + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
    if ROPE:
        first, second = first * cos - second * sin, second * cos + first * sin
    dtype = b.dtype.element_ty
    return join_halves(first.to(dtype), second.to(dtype), N, Q)


@triton.jit
def weighted_rows(rows, weight):
    """weight ⊙ rows, rounded once: weight [Q] is one a row."""
    return (rows.to(tl.float32) * weight[:, None]).to(rows.dtype)


@triton.jit
def join_halves(first, second, N: tl.constexpr, Q: tl.constexpr):
    """[Q, N] of its halves of columns."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (Q, N))


@triton.jit
def store_unrotated(out, grad, cos, sin, valid, STRIDE: tl.constexpr, N: tl.constexpr,
                    Q: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """The transposed rotation of grad [Q, N], to rows STRIDE apart."""
    first, second = tl.split(tl.permute(tl.reshape(grad, (Q, 2, N // 2)), (0, 2, 1)))
    if ROPE:
        first, second = first * cos + second * sin, second * cos - first * sin
    offsets = tl.arange(0, Q)[:, None] * STRIDE + tl.arange(0, N // 2)[None, :]
    dtype = out.dtype.element_ty
    tl.store(out + offsets, first.to(dtype), mask=valid[:, None])
    tl.store(out + N // 2 + offsets, second.to(dtype), mask=valid[:, None])


@triton.jit
def load_rows(x, valid, STRIDE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """[Q, P] of rows STRIDE apart, 0 past the row's end."""
    offsets = tl.arange(0, Q)[:, None] * STRIDE + tl.arange(0, P)[None, :]
    return tl.load(x + offsets, mask=valid[:, None], other=0.0)


@triton.jit
def store_rows(out, values, valid, STRIDE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """values [P, Q], transposed, to rows STRIDE apart."""
    offsets = tl.arange(0, Q)[:, None] * STRIDE + tl.arange(0, P)[None, :]
    values = tl.trans(values.to(out.dtype.element_ty))
    tl.store(out + offsets, values, mask=valid[:, None])


@triton.jit
def state_offsets(P: tl.constexpr, N: tl.constexpr):
    """Of a contiguous [P, N] tile."""
    return tl.arange(0, P)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def segment_chunks(segment, segments, edge, middle, chunks):
    """First chunk of a segment, and the one after its last (`kernels.ssd.shapes.Segments`)."""
    first = tl.where(segment == 0, 0, edge + (segment - 1) * middle)
    return first, tl.where(segment == segments - 1, chunks, edge + segment * middle)


@triton.jit
def state_passing_kernel(
    states, carries, first, last, chunks,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """In place: what every chunk adds to the state becomes the state that reaches the chunk.

    states [B·H, chunks, SIZE]; carries [B·H, chunks] float32, the decay across a chunk; first, last
    [B·H, SIZE] float32: what enters the first chunk (None: 0) and what leaves the last one (None:
    not stored). REVERSE walks from the last chunk to the first, as gradients do.
    """
    head = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    states += head * chunks * SIZE
    if first is not None:
        state = tl.load(first + head * SIZE + element)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    # few elements walk a long way: only chunks fetched ahead keep the memory busy
    for k in tl.range(0, chunks, num_stages=AHEAD):
        chunk = chunks - 1 - k if REVERSE else k
        here = states + chunk.to(tl.int64) * SIZE + element
        added = tl.load(here).to(tl.float32)
        tl.store(here, state.to(states.dtype.element_ty))
        state = state * tl.load(carries + head * chunks + chunk) + added
    if last is not None:
        tl.store(last + head * SIZE + element, state)
