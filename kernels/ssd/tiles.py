"""Fixed tile choices of the Triton scan, and which of its two shapes a problem takes."""

from dataclasses import dataclass

import torch

from kernels.target import Target


@dataclass(frozen=True)
class Tile:
    chunk: int  # tokens of a chunk, Q
    p_block: int  # of the fused forward: rows of the state a program holds
    num_warps: int
    num_stages: int
    maxnreg: int | None  # registers a thread; None: the compiler's choice


def tile(
    target: Target, dtype: torch.dtype, head_dim: int, state_dim: int, chunk_size: int
) -> Tile:
    """By architecture, dtype and state size, from what the compiler makes of each choice.

    - A longer chunk_size than these tiles have is taken as an upper bound: results do not depend on
      it, and longer tiles fit neither registers nor shared memory.
    - 16 bits: chunks of 64, the smallest the Hopper tensor cores take whole.
    - float32 has no tensor-core product exact to its last bits: chunks of 16, small blocks.
    - Two stages on sm_90 in 16 bits: a chunk is fetched while the one before is computed. Else one:
      on sm_10x pipelined loops that carry a decayed accumulator are miscompiled (Triton pull
      request 10993), and sm_80 and gfx942 have less shared memory.
    - Registers are given out in full where ptxas, left alone, may settle for 32 and spill the rest:
      on sm_80, and in float32.
    """
    nvidia, exact = target.backend == "cuda", dtype.itemsize == 4
    maxnreg = 255 if nvidia and (target.arch == 80 or exact) else None
    if exact:
        return Tile(min(chunk_size or 16, 16), min(head_dim, 32), 8, 1, maxnreg)
    stages = 2 if nvidia and target.arch == 90 else 1
    return Tile(min(chunk_size or 64, 64), head_dim, 8, stages, maxnreg)


def fills_gpu(programs: int, num_sms: int) -> bool:
    """Whether the fused shape, one program for a whole sequence, is the better one.

    It moves the fewest bytes, but its programs cannot be shared out over a sequence: below half a
    GPU of them, the split shape's second trip through the states costs less than idle processors.
    """
    return 2 * programs >= num_sms


def backward_is_fused(dtype: torch.dtype, sequences: int, num_sms: int) -> bool:
    """In float32 never: operands of its products are in registers too, which leaves no room for a
    state's gradient."""
    return dtype.itemsize == 2 and fills_gpu(sequences, num_sms)
