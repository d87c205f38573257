"""The order of samples: a seeded permutation that needs no table.

Sample k of a run over n samples is `P(seed, k // n)[k mod n]`. P is a Feistel network on
[0, 4^h), 4^h ≥ n, where each of its rounds

    (left, right) ← (right, left ⊕ F(right + key_r) mod 2^h)

is a bijection whatever F is. Values that land at n or above are sent through again until they fall
below n (cycle walking), which keeps it a bijection on [0, n). A look-up takes O(1) time and no
memory, so a run of any length resumes at any k at once.
"""

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
def _keys(seed: int, epoch: int, source: int) -> tuple[np.uint64, ...]:
    """ROUNDS round keys; numpy promises SeedSequence's values never change."""
    sequence = np.random.SeedSequence((seed, epoch), spawn_key=(source,) if source else ())
    return tuple(sequence.generate_state(ROUNDS, np.uint64))


def permute(
    positions: NDArray[np.int64], n: int, *, seed: int, epoch: int, source: int = 0
) -> NDArray[np.int64]:
    """Where a permutation of range(n) keyed by (seed, epoch, source) sends `positions` (int64 [m]).

    Raises ValueError when a position lies outside range(n) or seed or epoch is negative.
    """
    if positions.size and not (positions.min() >= 0 and positions.max() < n):
        raise ValueError(f"positions {positions.min()}..{positions.max()} outside range({n})")
    half = max(MIN_HALF_BITS, -(-(n - 1).bit_length() // 2))
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = _keys(seed, epoch, source)

    values = positions.astype(np.uint64)
    walking = np.arange(values.size)  # entries still outside [0, n); at first, all
    while walking.size:
        left, right = values[walking] >> bits, values[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        values[walking] = (left << bits) | right
        walking = walking[values[walking] >= n]
    return values.astype(np.int64)


def sample_indices(
    seed: int, counters: NDArray[np.int64], n: int, source: int = 0
) -> NDArray[np.int64]:
    """Dataset indices (int64 [m]) of samples number `counters` (int64 [m]) of a source of n."""
    epochs, positions = np.divmod(counters, n)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permute(positions[chosen], n, seed=seed, epoch=int(epoch), source=source)
    return indices


def sample_index(seed: int, k: int, n: int) -> tuple[int, int]:
    """(epoch, dataset index) of sample `k` of the run over n samples."""
    return k // n, int(sample_indices(seed, np.array([k], np.int64), n)[0])
