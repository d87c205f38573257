"""Every formula of traffic the audit states, against what the kernels move when interpreted."""

import pytest

import kernels.target
from kernels.audit.cases import SMALL_TARGET, Case, cases
from kernels.audit.counting import count


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_formulas_say_what_kernels_move(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.target, "INTERPRETED", SMALL_TARGET)
    formulas = case.small.work(SMALL_TARGET)
    counted = count(case)
    assert counted.keys() == formulas.keys()
    for direction, (loaded, stored, atomic) in counted.items():
        formula = formulas[direction].traffic
        assert (loaded, stored) == (formula.loaded, formula.stored), direction
        assert atomic == 0, "no atomics in the default mode"
