"""A part of the campaign of benchmarks.checkpoint_faults."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.checkpoint_faults import Campaign, kinds, one_run


@pytest.fixture(scope="module")
def campaign() -> Iterator[Campaign]:
    # not pytest's folder, which is its user's alone: one fault is met as another user
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Campaign(Path(name))


@pytest.mark.parametrize("number", [0, 1, 3, 6, 8, 11, 13, 15, 17, 19])
def test_a_run_goes_on_after_a_fault_in_its_save(campaign: Campaign, number: int) -> None:
    result = one_run(campaign, 1000 + number, kinds(20)[number])
    assert not result["bad"], result
