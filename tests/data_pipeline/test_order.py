import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Windows, permute, sample_index, sample_indices


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_permutation_is_a_bijection(n, seed, epoch):
    out = permute(np.arange(n), n, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(out), np.arange(n))


@settings(deadline=None)
@given(n=st.integers(2**33, 2**50), seed=st.integers(0, 99))
def test_large_permutation_stays_in_range_without_a_table(n, seed):
    out = permute(np.array([0, 1, n // 2, n - 1]), n, seed=seed, epoch=0)
    assert out.min() >= 0
    assert out.max() < n
    assert len(set(out.tolist())) == 4


def test_every_position_is_about_equally_likely():
    n, trials = 10, 2000
    first = [int(permute(np.array([0]), n, seed=s, epoch=0)[0]) for s in range(trials)]
    expected = trials / n
    chi_square = float(((np.bincount(first, minlength=n) - expected) ** 2 / expected).sum())
    assert chi_square < 27.9  # 99.9 % quantile at 9 degrees of freedom


def test_neighbours_are_scattered():
    out = permute(np.arange(10_000), 10_000, seed=1, epoch=0)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.05


def test_order_is_fixed_for_ever():
    """A change here breaks the resumption of every existing run."""
    assert permute(np.arange(8), 8, seed=1234, epoch=0).tolist() == [5, 3, 6, 4, 2, 0, 1, 7]


def test_run_visits_every_sample_once_an_epoch_in_another_order():
    n = 37
    order = sample_indices(5, np.arange(3 * n), n).reshape(3, n)
    assert (np.sort(order, axis=1) == np.arange(n)).all()
    assert not np.array_equal(order[0], order[1])
    assert sample_index(5, n + 3, n) == (1, order[1, 3])


def test_positions_outside_are_refused():
    with pytest.raises(ValueError, match="outside"):
        permute(np.array([5]), 5, seed=0, epoch=0)


@settings(deadline=None)
@given(
    n=st.integers(1, 500),
    seed=st.integers(0, 99),
    block=st.integers(1, 40),
    blocks=st.integers(1, 9),
)
def test_windows_move_samples_among_few_blocks_and_lose_none(n, seed, block, blocks):
    windows = Windows(block, blocks)
    order = sample_indices(seed, np.arange(2 * n), n, windows=windows).reshape(2, n)
    assert (np.sort(order, axis=1) == np.arange(n)).all()
    for k in (0, n - 1, n, 2 * n - 1):  # whoever asks, and for whatever else
        alone = sample_indices(seed, np.array([k]), n, windows=windows)
        assert alone[0] == order.reshape(-1)[k]
    for epoch in order:
        seen: list[int] = []  # blocks of the window
        done: set[int] = set()
        for index in epoch.tolist():
            if index // block not in seen:
                if len(seen) == blocks:  # the next window begins when this one is read whole
                    done.update(seen)
                    seen = []
                seen.append(index // block)
            assert index // block not in done


def test_a_window_is_shuffled_as_a_whole():
    windows = Windows(100, 10)
    order = sample_indices(3, np.arange(10_000), 10_000, windows=windows)
    first = order[:1000]
    assert np.unique(first // 100).size == 10
    for part in np.split(first, 10):
        assert np.unique(part // 100).size == 10
    again = sample_indices(3, np.arange(10_000, 20_000), 10_000, windows=windows)
    assert set((again[:1000] // 100).tolist()) != set((first // 100).tolist())


def test_windowed_order_is_fixed_for_ever():
    """A change here breaks the resumption of every existing run."""
    found = sample_indices(1234, np.arange(10), 10, source=1, windows=Windows(2, 2))
    assert found.tolist() == [5, 1, 0, 4, 2, 8, 3, 9, 7, 6]


def by_tables(seed: int, n: int, block: int, blocks: int) -> list[int]:
    """The first epoch as the module describes it, block by block and window by window."""
    count = -(-n // block)
    order = permute(np.arange(count), count, seed=seed, epoch=0).tolist()
    found = []
    for number, first in enumerate(range(0, count, blocks)):
        window = [
            index
            for place in order[first : first + blocks]
            for index in range(place * block, min((place + 1) * block, n))
        ]
        size = len(window)
        moved = permute(np.arange(size), size, seed=seed, epoch=0, window=number + 1)
        found += [window[at] for at in moved.tolist()]
    return found


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 300),
    seed=st.integers(0, 99),
    block=st.integers(1, 40),
    blocks=st.integers(1, 9),
)
def test_windows_are_as_described(n, seed, block, blocks):
    found = sample_indices(seed, np.arange(n), n, windows=Windows(block, blocks))
    if n > block * blocks:
        assert found.tolist() == by_tables(seed, n, block, blocks)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_small_windows_take_no_longer(blocks):
    begin = time.process_time()
    sample_indices(0, np.arange(4096), 10_000, windows=Windows(1, blocks))  # took a minute
    assert time.process_time() - begin < 5


def test_windows_of_a_large_source_need_no_table():
    n = 10**12
    found = sample_indices(0, np.array([0, 1, n - 1]), n, windows=Windows(1, 2))
    assert len(set(found.tolist())) == 3
    assert found.max() < n
