"""Tile choices of the Triton scan.

Tiles are fixed, so that a run computes the same as the one before. TRANSXSSM_TILES=FILE replaces
those that `transxssm kernels tune` found to be faster on some GPU; nothing is tuned while training.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
import triton

from kernels.errors import KernelsError
from kernels.target import Target
from untrusted.errors import UnsafeFileError
from untrusted.files import read_regular, write_durably

VARIABLE = "TRANSXSSM_TILES"
MAX_BYTES = 1 << 20  # of its file, which has some 200 a tile


@dataclass(frozen=True)
class Tile:
    chunk: int  # tokens of a chunk, Q
    p_block: int  # rows of the state that are in registers at a time; the fused backward has all P
    num_warps: int
    num_stages: int
    maxnreg: int | None  # registers a thread; None: the compiler's choice


_forced: Tile | None = None


def tile(
    target: Target, dtype: torch.dtype, head_dim: int, state_dim: int, chunk_size: int
) -> Tile:
    """The tile of a scan; chunk_size is an upper bound of its chunk, 0 none.

    Results do not depend on a chunk's length, and longer ones than are chosen here fit neither
    registers nor shared memory. Raises KernelsError for a bad file in TRANSXSSM_TILES.
    """
    choice = (
        _forced
        or tuned_tiles().get(key(target, dtype, head_dim, state_dim))
        or fixed_tile(target, dtype, head_dim, state_dim)
    )
    return replace(choice, chunk=min(chunk_size or choice.chunk, choice.chunk))


def fixed_tile(target: Target, dtype: torch.dtype, head_dim: int, state_dim: int) -> Tile:
    """By architecture, dtype and state size, from what the compiler makes of each choice.

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
    nvidia, from_shared = target.backend == "cuda", products_read_shared(target, dtype)
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
    return Tile(chunk, min(head_dim, p_block), 8, stages, maxnreg)


@contextlib.contextmanager
def forced_tile(choice: Tile) -> Iterator[None]:
    """Within it, every scan of this process has this tile."""
    global _forced
    _forced = choice
    try:
        yield
    finally:
        _forced = None


def key(target: Target, dtype: torch.dtype, head_dim: int, state_dim: int) -> str:
    """What a tile is chosen by, as it stands in a file of tiles."""
    name = str(dtype).removeprefix("torch.")
    return f"{target.backend} {target.arch} {name} P{head_dim} N{state_dim}"


def tuned_tiles() -> dict[str, Tile]:
    """Those of the file that TRANSXSSM_TILES names, by key. Raises KernelsError for a bad one."""
    path = os.environ.get(VARIABLE)
    return read_tiles(Path(path)) if path else {}


@lru_cache
def read_tiles(path: Path) -> dict[str, Tile]:
    """Raises KernelsError where the file is not one of tiles or was made by another Triton."""
    again = "make it anew: transxssm kernels tune --output FILE"
    try:
        content = json.loads(read_regular(path, MAX_BYTES, follow_link=True))
        version, tiles = content["triton"], content["tiles"]
        found = {name: Tile(**tile) for name, tile in tiles.items()}
    except OSError as error:
        raise KernelsError(f"{VARIABLE}: cannot read {path}: {error.strerror}") from error
    except UnsafeFileError as error:
        raise KernelsError(f"{VARIABLE}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KernelsError(
            f"{VARIABLE}: {path} is not a file of tiles ({error}); {again}"
        ) from error
    if version != triton.__version__:
        raise KernelsError(
            f"{VARIABLE}: {path} was made with Triton {version}, this is {triton.__version__};"
            f" {again}"
        )
    for name, choice in found.items():
        if fault := _fault(choice, name):
            raise KernelsError(f"{VARIABLE}: {path}: {name}: {fault}; {again}")
    return found


def write_tiles(path: Path, tiles: dict[str, Tile]) -> None:
    """Atomically."""
    plain = {
        name: {field.name: getattr(choice, field.name) for field in fields(choice)}
        for name, choice in sorted(tiles.items())
    }
    content = json.dumps({"triton": triton.__version__, "tiles": plain}, indent=1) + "\n"
    write_durably(path, content.encode())


def _fault(choice: Tile, name: str) -> str | None:
    found = re.search(r" P(\d+) N\d+$", name)
    if found is None:
        return "expected a name such as 'cuda 90 bfloat16 P128 N128'"
    head_dim = int(found.group(1))
    for field, allowed in {
        "chunk": (16, 32, 64, 128),
        "p_block": tuple(size for size in (16, 32, 64, 128, 256) if head_dim % size == 0),
        "num_warps": (1, 2, 4, 8, 16),
        "num_stages": (1, 2, 3, 4),
        "maxnreg": (None, *range(24, 256)),
    }.items():
        if (value := getattr(choice, field)) not in allowed:
            expected = allowed if len(allowed) < 8 else "null or 24 to 255"
            return f"{field} = {value!r}, expected one of {expected}"
    return None


def products_read_shared(target: Target, dtype: torch.dtype) -> bool:
    """Whether tensor cores take both operands from shared memory, which leaves registers free."""
    hopper_or_datacenter_blackwell = isinstance(target.arch, int) and target.arch // 10 in (9, 10)
    return dtype.itemsize == 2 and hopper_or_datacenter_blackwell
