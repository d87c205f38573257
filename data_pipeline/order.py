"""The order of samples: a seeded permutation that needs no table of samples.

Sample k of a run over n samples is `P(seed, k // n)[k mod n]`. P is a Feistel network on
[0, 4^h), 4^h ≥ n, where each of its rounds

    (left, right) ← (right, left ⊕ F(right + key_r) mod 2^h)

is a bijection whatever F is. Values that land at n or above are sent through again until they fall
below n (cycle walking), which keeps it a bijection on [0, n). A look-up takes O(1) time and no
memory, so a run of any length resumes at any k at once.

Of a large source that would mean all of its shards at once, all the time. So its samples are cut
into blocks of neighbours; an epoch takes the blocks in a permuted order, some of them together as a
window, and permutes the samples within each window. Only blocks have a table.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
MIN_HALF_BITS = 3  # tiny networks mix badly; 64 values cost at most 64 extra walks


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every input bit reaches every output bit. uint64 wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int, source: int, window: int) -> tuple[np.uint64, ...]:
    """ROUNDS round keys; numpy promises SeedSequence's values never change."""
    spawn_key = (source, window) if window else (source,) if source else ()
    sequence = np.random.SeedSequence((seed, epoch), spawn_key=spawn_key)
    return tuple(sequence.generate_state(ROUNDS, np.uint64))


def permute(
    positions: NDArray[np.int64],
    n: int,
    *,
    seed: int,
    epoch: int,
    source: int = 0,
    window: int = 0,
) -> NDArray[np.int64]:
    """Where the permutation of range(n) of these keys sends `positions` (int64 [m]).

    Raises ValueError when a position lies outside range(n) or seed or epoch is negative.
    """
    if positions.size and not (positions.min() >= 0 and positions.max() < n):
        raise ValueError(f"positions {positions.min()}..{positions.max()} outside range({n})")
    half = max(MIN_HALF_BITS, -(-(n - 1).bit_length() // 2))
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = _keys(seed, epoch, source, window)

    values = positions.astype(np.uint64)
    walking = np.arange(values.size)  # entries still outside [0, n); at first, all
    while walking.size:
        left, right = values[walking] >> bits, values[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        values[walking] = (left << bits) | right
        walking = walking[values[walking] >= n]
    return values.astype(np.int64)


@dataclass(frozen=True)
class Windows:
    """How far samples are moved: blocks of so many neighbours, so many blocks together."""

    block: int
    blocks: int


@lru_cache(maxsize=16)
def _block_table(
    seed: int, epoch: int, source: int, n: int, block: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Blocks in an epoch's order, and where each ends in it; int64 [blocks]."""
    count = -(-n // block)
    order = permute(np.arange(count), count, seed=seed, epoch=epoch, source=source)
    sizes = np.minimum(block, n - order * block)
    return order, np.cumsum(sizes)


def _windowed(
    positions: NDArray[np.int64], n: int, windows: Windows, *, seed: int, epoch: int, source: int
) -> NDArray[np.int64]:
    """As `permute`, by blocks and windows."""
    order, ends = _block_table(seed, epoch, source, n, windows.block)
    moved = np.empty_like(positions)
    numbers = np.searchsorted(ends, positions, side="right") // windows.blocks
    for number in np.unique(numbers).tolist():
        here = numbers == number
        first = number * windows.blocks
        begin = int(ends[first - 1]) if first else 0
        size = int(ends[min(first + windows.blocks, ends.size) - 1]) - begin
        moved[here] = begin + permute(
            positions[here] - begin, size, seed=seed, epoch=epoch, source=source, window=number + 1
        )
    places = np.searchsorted(ends, moved, side="right")
    begins = np.where(places > 0, ends[places - 1], 0)
    return order[places] * windows.block + moved - begins


def sample_indices(
    seed: int, counters: NDArray[np.int64], n: int, source: int = 0, windows: Windows | None = None
) -> NDArray[np.int64]:
    """Dataset indices (int64 [m]) of samples number `counters` (int64 [m]) of a source of n.

    windows: of a source that is larger than one; None: the whole epoch is one.
    """
    epochs, positions = np.divmod(counters, n)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        if windows is None or n <= windows.block * windows.blocks:
            found = permute(positions[chosen], n, seed=seed, epoch=epoch, source=source)
        else:
            found = _windowed(positions[chosen], n, windows, seed=seed, epoch=epoch, source=source)
        indices[chosen] = found
    return indices


def sample_index(seed: int, k: int, n: int) -> tuple[int, int]:
    """(epoch, dataset index) of sample `k` of the run over n samples."""
    return k // n, int(sample_indices(seed, np.array([k], np.int64), n)[0])
