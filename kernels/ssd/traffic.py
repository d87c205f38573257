"""What the Triton scan moves through device memory and multiplies, counted from its programs.

Every load and store of every program counts, whether or not a cache could serve it. The rotation
table is counted as kernels read it; building it (once a forward, from float32 cos and sin) is not.
"""

from dataclasses import dataclass

import torch

from kernels.ssd.tiles import backward_is_fused, fills_gpu, tile
from kernels.target import Target


@dataclass(frozen=True)
class Problem:
    """One scan: rotation, initial state absent, no D, as many groups as heads, dt in x's dtype,
    float32 A and dt_bias; training, so that the states at chunk entries are kept."""

    batch: int
    length: int
    heads: int
    head_dim: int
    state_dim: int
    dtype: torch.dtype

    @property
    def sequences(self) -> int:
        return self.batch * self.heads


def minimum(problem: Problem) -> tuple[int, int]:
    """Bytes of forward and backward when every input and output moves once, cos and sin not."""
    token = (2 * problem.head_dim + 2 * problem.state_dim + 1) * problem.dtype.itemsize
    forward = problem.sequences * problem.length * token
    gradients = (problem.head_dim + 2 * problem.state_dim + 1) * problem.dtype.itemsize
    return forward, forward + problem.sequences * problem.length * gradients


def forward(problem: Problem, target: Target) -> tuple[int, int, int]:
    """Bytes loaded, bytes stored, FLOPs."""
    P, N, s = problem.head_dim, problem.state_dim, problem.dtype.itemsize
    choice = tile(target, problem.dtype, P, N, 0)
    Q, length = choice.chunk, problem.length
    chunks = -(-length // Q)
    decay = length * s + chunks * (4 * Q + 8)  # dt; documents
    rotation = length * N * _table_itemsize(problem.dtype)
    state = P * N
    if fills_gpu(problem.sequences * (P // choice.p_block), target.num_sms):
        blocks = P // choice.p_block
        inputs = decay + rotation + 2 * length * N * s + 8
        loaded = blocks * inputs + length * P * s
        stored = length * P * s + chunks * state * s + state * 4
        flops = 2 * Q * Q * (blocks * N + P) + 4 * Q * state
    else:
        added = decay + rotation + length * (N + P) * s + 8 * chunks
        output = decay + rotation + length * (2 * N + P) * s + chunks * (state * s + 8)
        passing = chunks * (state * s + 4 * _passing_programs(state))
        loaded = added + passing + output
        stored = 2 * chunks * state * s + 4 * chunks + state * 4 + length * P * s
        flops = 2 * Q * Q * (N + P) + 4 * Q * state
    sequences = problem.sequences
    return sequences * loaded, sequences * stored, sequences * chunks * flops


def backward(problem: Problem, target: Target) -> tuple[int, int, int]:
    """Bytes loaded, bytes stored, FLOPs; without a gradient of the final state."""
    P, N, s = problem.head_dim, problem.state_dim, problem.dtype.itemsize
    choice = tile(target, problem.dtype, P, N, 0)
    Q, length = choice.chunk, problem.length
    chunks = -(-length // Q)
    decay = length * s + chunks * (4 * Q + 8)
    rotation = length * N * _table_itemsize(problem.dtype)
    state = P * N
    loaded = decay + 2 * rotation + length * (2 * P + 2 * N) * s + chunks * state * s
    stored = length * ((P + 2 * N) * s + 16) + 4 * chunks
    # decay gradients: four sums a token, one a chunk
    loaded += decay + 16 * length + chunks * (4 + 8)
    stored += length * s + 8 * chunks
    flops = 2 * Q * Q * (5 * N + 2 * P) + 6 * Q * state
    if backward_is_fused(target, problem.dtype, problem.sequences):
        loaded += 8
    else:
        added = decay + rotation + length * (N + P) * s + 8 * chunks
        passing = chunks * (state * s + 4 * _passing_programs(state))
        loaded += added + passing + chunks * (state * s + 8)
        if choice.p_block < P:  # x once more, dy twice, the states' gradients once
            loaded += length * 3 * P * s + chunks * state * s
        stored += chunks * (2 * state * s + 4) + state * 4
    flops += 2 * Q * state
    sequences = problem.sequences
    return sequences * loaded, sequences * stored, sequences * chunks * flops


def _table_itemsize(dtype: torch.dtype) -> int:
    return 4 if dtype == torch.float32 else 2


def _passing_programs(state: int) -> int:
    return -(-state // 1024)
