"""What the Triton scan moves through device memory and multiplies, counted from its programs.

Every load and store of every program counts, whether or not a cache could serve it. The rotation
table is counted as kernels read it; building it (from float32 cos and sin) is not.

Counted are problems with rotation, without initial state, gradient of the final state and D, with
dt in x's dtype, float32 A and dt_bias; training, so that the states at chunk entries are kept.
"""

from dataclasses import dataclass

from kernels.ssd.shapes import Problem, Shape
from kernels.ssd.tiles import Tile

PASSING_BLOCK = 1024  # elements of a state in a program that passes states on


@dataclass
class Moved:
    """Bytes loaded, bytes stored and FLOPs."""

    loaded: int = 0
    stored: int = 0
    flops: int = 0

    def add(self, programs: int, loaded: int, stored: int, flops: int = 0) -> None:
        self.loaded += programs * loaded
        self.stored += programs * stored
        self.flops += programs * flops

    @property
    def total(self) -> int:
        return self.loaded + self.stored


class _Sizes:
    """Bytes of what programs move, for one problem and tile."""

    def __init__(self, problem: Problem, tile: Tile) -> None:
        self.P, self.N, self.Q = problem.head_dim, problem.state_dim, tile.chunk
        self.s = problem.dtype.itemsize
        self.length, self.chunks = problem.length, -(-problem.length // tile.chunk)
        self.documents = 4 * self.Q + 8  # of a chunk
        self.rotation = self.N * max(2, self.s)  # of a token: float32, or else float16
        self.state = self.P * self.N
        self.vectors = 8  # A and dt_bias

    def tokens(self, chunks: range) -> int:
        return max(0, min(chunks.stop * self.Q, self.length) - chunks.start * self.Q)


def minimum(problem: Problem) -> tuple[int, int]:
    """Bytes of forward and backward when every input and output moves once, cos and sin not."""
    heads, shared = problem.heads, 2 * problem.groups * problem.state_dim
    token = heads * (2 * problem.head_dim + 1) + shared
    gradients = heads * (problem.head_dim + 1) + shared
    tokens = problem.batch * problem.length * problem.dtype.itemsize
    return tokens * token, tokens * (token + gradients)


def forward(problem: Problem, tile: Tile, shape: Shape) -> Moved:
    moved, z = Moved(), _Sizes(problem, tile)
    if shape.kind == "split":
        _states(moved, z, problem, shape.heads, span=1)
        moved.add(problem.batch * problem.heads, 0, 4 * z.state)  # the final state
        programs, heads = problem.batch * problem.heads // shape.heads, shape.heads
        loaded = z.chunks * z.documents + z.length * (z.rotation + 2 * z.N * z.s)
        loaded += heads * (z.chunks * (z.vectors + z.state * z.s) + z.length * (1 + z.P) * z.s)
        flops = z.chunks * 2 * z.Q * (z.Q * z.N + heads * (z.Q * z.P + z.state))
        moved.add(programs, loaded, heads * z.length * z.P * z.s, flops)
        return moved
    blocks, P = z.P // tile.p_block, tile.p_block
    programs = problem.batch * problem.groups * -(-problem.per_group // shape.heads) * blocks
    held = problem.batch * problem.heads * blocks  # heads of all programs; some have one for two
    for segment in range(shape.segments):
        chunks = shape.chunks_of(segment, z.chunks)
        tokens = z.tokens(chunks)
        loaded = len(chunks) * z.documents + tokens * (z.rotation + 2 * z.N * z.s)
        loaded += shape.heads * (z.vectors + _sums_of_exits(segment, P * z.N))
        flops = 2 * z.Q * (z.Q * z.N + shape.heads * P * (z.Q + 2 * z.N))
        moved.add(programs, loaded, 0, len(chunks) * flops)
        moved.add(held, tokens * (1 + P) * z.s, tokens * P * z.s + len(chunks) * P * z.N * z.s)
        if 0 < segment < shape.segments - 1:  # read by the first launch as well
            loaded = len(chunks) * z.documents + tokens * (z.rotation + z.N * z.s)
            loaded += shape.heads * z.vectors
            moved.add(programs, loaded, 0, len(chunks) * shape.heads * 2 * z.Q * P * z.N)
            moved.add(held, tokens * (1 + P) * z.s, 0)
            moved.add(problem.batch * problem.heads, 0, 4)
        moved.add(held, 0, 4 * P * z.N)  # what leaves the segment, or the final state
    return moved


def backward(problem: Problem, tile: Tile, shape: Shape) -> Moved:
    moved, z = Moved(), _Sizes(problem, tile)
    sequences = problem.batch * problem.heads
    products = 2 * z.Q * (z.Q * (3 * z.N + 2 * z.P) + 3 * z.state)
    moved.add(sequences * z.chunks, 8, 8)  # shares of the gradients of A and dt_bias
    moved.add(problem.heads, 0, 8)
    if shape.kind == "split":
        _states(moved, z, problem, problem.per_group, shape.span)
        pairs = [range(k, k + 1) for k in range(1, z.chunks, 2)] if shape.span == 2 else []
        again = sum(z.tokens(chunk) for chunk in pairs)  # tokens that two programs read
        rows = problem.batch * problem.groups
        loaded = shape.span * z.chunks * z.documents + z.length * (2 * z.rotation + 2 * z.N * z.s)
        loaded += again * (z.rotation + z.N * z.s)
        moved.add(rows, loaded, z.length * 2 * z.N * z.s)
        several = tile.p_block < z.P
        loaded = z.chunks * (z.vectors + (2 + several) * z.state * z.s) + again * (1 + z.P) * z.s
        loaded += z.length * (2 + (5 if several else 2) * z.P) * z.s
        flops = z.chunks * (products + (shape.span - 1) * 2 * z.Q * z.state)
        moved.add(sequences, loaded, z.length * (1 + z.P) * z.s, flops)
        return moved
    for segment in range(shape.segments):
        chunks = shape.chunks_of(segment, z.chunks)
        tokens, count = z.tokens(chunks), len(chunks)
        loaded = z.vectors + _sums_of_exits(shape.segments - 1 - segment, z.state)
        loaded += count * (z.documents + z.state * z.s)
        loaded += tokens * (2 * z.rotation + (2 + 2 * z.P + 2 * z.N) * z.s)
        stored = tokens * (1 + z.P + 2 * z.N) * z.s
        moved.add(sequences, loaded, stored, count * (products + 2 * z.Q * z.state))
        if 0 < segment < shape.segments - 1:
            loaded = z.vectors + count * z.documents
            loaded += tokens * (z.rotation + (1 + z.P + z.N) * z.s)
            moved.add(sequences, loaded, 4, count * 2 * z.Q * z.state)
        if segment > 0:
            moved.add(sequences, 0, 4 * z.state)
    return moved


def _states(moved: Moved, z: _Sizes, problem: Problem, walked: int, span: int) -> None:
    """What chunks add to a state or its gradient, and the pass that accumulates it."""
    spans = -(-z.chunks // span)
    loaded = spans * span * z.documents + z.length * (z.rotation + z.N * z.s)
    loaded += walked * (spans * z.vectors + z.length * (1 + z.P) * z.s)
    stored = walked * spans * (z.state * z.s + 4)
    flops = spans * span * walked * 2 * z.Q * z.state
    moved.add(problem.batch * problem.heads // walked, loaded, stored, flops)
    programs = -(-z.state // PASSING_BLOCK)
    passed = spans * z.state * z.s
    moved.add(problem.batch * problem.heads, passed + programs * spans * 4, passed)


def _sums_of_exits(earlier: int, state: int) -> int:
    """Bytes that make what enters a segment with so many before it, of one head."""
    return 4 * earlier * state + 4 * max(0, earlier - 1)
