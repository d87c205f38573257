"""The order of samples: a seeded permutation that needs no table of samples.

Sample k of a run over n samples is `P(seed, k // n)[k mod n]`. P is a Feistel network on
[0, 4^h), 4^h ≥ n, where each of its rounds

    (left, right) ← (right, left ⊕ F(right + key_r) mod 2^h)

is a bijection whatever F is. Values that land at n or above are sent through again until they fall
below n (cycle walking), which keeps it a bijection on [0, n). A look-up takes O(1) time and no
memory, so a run of any length resumes at any k at once.

Of a large source that would mean all of its shards at once, all the time. So its samples are cut
into blocks of neighbours; an epoch takes the blocks in a permuted order, some of them together as a
window, and permutes the samples within each window. All blocks but the last are of one size, so
they need no table either.
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
    keys = np.array(_keys(seed, epoch, source, window))[:, None]
    count = positions.size
    return _walk(positions, np.full(count, n, np.uint64), np.broadcast_to(keys, (ROUNDS, count)))


def _walk(
    positions: NDArray[np.int64], sizes: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """`permute` of each position in a range of its own size [m] by its own keys [ROUNDS, m]."""
    bits, mask = _network(sizes)
    values = positions.astype(np.uint64)
    walking = np.flatnonzero(sizes > 1)  # entries still outside [0, n); at first, all
    while walking.size:
        half, low = bits[walking], mask[walking]
        left, right = values[walking] >> half, values[walking] & low
        for key in keys[:, walking]:
            left, right = right, left ^ (_mix(right + key) & low)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= sizes[walking]]
    return values.astype(np.int64)


def _network(sizes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Bits of half a network's values, and as many ones, for ranges of these sizes [m]."""
    distinct, which = np.unique(sizes, return_inverse=True)
    half = [max(MIN_HALF_BITS, -(-(n - 1).bit_length() // 2)) for n in distinct.tolist()]
    bits = np.array(half, np.uint64)[which]
    return bits, (np.uint64(1) << bits) - np.uint64(1)


@lru_cache(maxsize=64)
def _place_of_last(n: int, seed: int, epoch: int, source: int) -> int:
    """The position that `permute` sends to n - 1: each round of the network backwards."""
    bits, mask = _network(np.array([n], np.uint64))
    value = np.array([n - 1], np.uint64)
    while True:
        left, right = value >> bits, value & mask
        for key in reversed(_keys(seed, epoch, source, 0)):
            left, right = right ^ (_mix(left + key) & mask), left
        value = (left << bits) | right
        if value[0] < n:
            return int(value[0])


@dataclass(frozen=True)
class Windows:
    """How far samples are moved: blocks of so many neighbours, so many blocks together."""

    block: int
    blocks: int


def _windowed(
    positions: NDArray[np.int64], n: int, windows: Windows, *, seed: int, epoch: int, source: int
) -> NDArray[np.int64]:
    """As `permute`, by blocks and windows."""
    block, count = windows.block, -(-n // windows.block)
    missing = count * block - n  # from the last block, which in the epoch's order is at place:
    last = _place_of_last(count, seed, epoch, source)

    def places_at(positions: NDArray[np.int64]) -> NDArray[np.int64]:
        before = positions < (last + 1) * block - missing
        return np.where(before, positions, positions + missing) // block

    def begins_of(places: NDArray[np.int64]) -> NDArray[np.int64]:
        return places * block - np.where(places > last, missing, 0)

    numbers, which = np.unique(places_at(positions) // windows.blocks, return_inverse=True)
    begins = begins_of(numbers * windows.blocks)
    sizes = begins_of(np.minimum((numbers + 1) * windows.blocks, count)) - begins
    keys = np.array([_keys(seed, epoch, source, number + 1) for number in numbers.tolist()]).T
    moved = begins[which] + _walk(
        positions - begins[which], sizes.astype(np.uint64)[which], keys[:, which]
    )
    places = places_at(moved)
    blocks = permute(places, count, seed=seed, epoch=epoch, source=source)
    return blocks * block + moved - begins_of(places)


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
