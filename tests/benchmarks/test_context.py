"""The benchmark of long sequences, at the length that CI has time for."""

import pytest

from benchmarks.context import main


def test_a_rank_holds_its_share_and_states_travel_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert "16384: a rank's peak is" in said
    assert said.count("met ") == 4
    assert "MISSED" not in said
