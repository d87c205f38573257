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

    - 16 bits: chunks of 64, the smallest the Hopper tensor cores take whole.
    - float32 has no tensor-core product exact to its last bits: chunks of 16, small blocks.
    - One stage: on sm_10x pipelined loops that carry a decayed accumulator are miscompiled (Triton
      pull request 10993), elsewhere a second stage costs registers the state needs.
    - sm_80: left alone, ptxas may settle for 32 registers and spill the rest.
    """
    maxnreg = 255 if target.backend == "cuda" and target.arch == 80 else None
    if dtype.itemsize == 4:
        return Tile(chunk_size or 16, min(head_dim, 32), 8, 1, maxnreg)
    return Tile(chunk_size or 64, head_dim, 8, 1, maxnreg)


def fills_gpu(programs: int, num_sms: int) -> bool:
    """Whether the fused shape, one program for a whole sequence, is the better one.

    It moves the fewest bytes, but its programs cannot be shared out over a sequence: below half a
    GPU of them, the split shape's second trip through the states costs less than idle processors.
    """
    return 2 * programs >= num_sms
