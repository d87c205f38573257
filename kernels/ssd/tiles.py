"""Fixed tile choices of the Triton scan, and which of its two shapes a problem takes."""

from dataclasses import dataclass

import torch

from kernels.target import Target


@dataclass(frozen=True)
class Tile:
    chunk: int  # tokens of a chunk, Q
    p_block: int  # rows of the state that are in registers at a time; the fused backward has all P
    num_warps: int
    num_stages: int
    maxnreg: int | None  # registers a thread; None: the compiler's choice


def tile(
    target: Target, dtype: torch.dtype, head_dim: int, state_dim: int, chunk_size: int
) -> Tile:
    """By architecture, dtype and state size, from what the compiler makes of each choice.

    - A longer chunk_size than these tiles have is taken as an upper bound: results do not depend on
      it, and longer tiles fit neither registers nor shared memory.
    - 16 bits where the tensor cores read shared memory (sm_90, sm_100): chunks of 64, the smallest
      that Hopper's take whole, and no blocks of P.
    - 16 bits elsewhere: operands pass through registers, which hold shorter chunks and blocks of P.
    - float32 has no tensor-core product exact to its last bits: chunks of 16, small blocks.
    - Two stages on sm_90 in 16 bits: a chunk is fetched while the one before is computed. Else one:
      on sm_10x pipelined loops that carry a decayed accumulator are miscompiled (Triton pull
      request 10993), and sm_80 and gfx942 have less shared memory.
    - Registers are given out in full where ptxas, left alone, may settle for 32 and spill the rest:
      where operands pass through registers.
    """
    nvidia, from_shared = target.backend == "cuda", _products_read_shared(target, dtype)
    maxnreg = 255 if nvidia and not from_shared else None
    if dtype.itemsize == 4:
        chunk, p_block = 16, 32 if nvidia else 16
    elif from_shared:
        chunk, p_block = 64, head_dim
    elif not nvidia and state_dim > 64:
        chunk, p_block = 16, 64
    else:
        chunk, p_block = 32, 32
    stages = 2 if from_shared and target.arch == 90 else 1
    return Tile(min(chunk_size or chunk, chunk), min(head_dim, p_block), 8, stages, maxnreg)


def _products_read_shared(target: Target, dtype: torch.dtype) -> bool:
    """Whether tensor cores take both operands from shared memory, which leaves registers free."""
    hopper_or_datacenter_blackwell = isinstance(target.arch, int) and target.arch // 10 in (9, 10)
    return dtype.itemsize == 2 and hopper_or_datacenter_blackwell


def fills_gpu(programs: int, num_sms: int) -> bool:
    """Whether the fused shape, one program for a whole sequence, is the better one.

    It moves the fewest bytes, but its programs cannot be shared out over a sequence: below half a
    GPU of them, the split shape's second trip through the states costs less than idle processors.
    """
    return 2 * programs >= num_sms


def backward_is_fused(target: Target, dtype: torch.dtype, sequences: int) -> bool:
    """Only where operands of products leave the registers to the state's gradient."""
    return _products_read_shared(target, dtype) and fills_gpu(sequences, target.num_sms)
