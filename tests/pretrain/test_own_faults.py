"""A fault of the program is shown as one, whatever its type; what a user can mend is a sentence."""

from collections.abc import Callable
from functools import partial

import pytest

from tests.pretrain.command import paragraph, run_command

REPORT_IT = "This is a fault of transxssm itself: please report it, with the lines above."


def break_generate(kind: type[Exception]) -> None:
    from pretrain import generate

    def broken(*_: object, **__: object) -> None:
        raise kind("an assumption of ours does not hold")

    generate.run = broken


def break_audit(kind: type[Exception]) -> None:
    from kernels.audit import command

    def broken(*_: object) -> int:
        raise kind("an assumption of ours does not hold")

    command.audit = broken


@pytest.mark.parametrize(
    ("before", "kind", "words"),
    [
        (break_generate, ValueError, ["generate", "nowhere"]),
        (break_generate, KeyError, ["generate", "nowhere"]),
        (break_audit, ValueError, ["kernels", "audit"]),
    ],
)
def test_a_fault_of_ours_shows_its_traceback(
    before: Callable[[type[Exception]], None], kind: type[Exception], words: list[str]
) -> None:
    (end,) = run_command(*words, before=partial(before, kind))
    assert end.code == 1
    assert "Traceback (most recent call last)" in end.output
    assert f"{kind.__name__}: " in end.output
    assert end.output.rstrip().endswith(REPORT_IT)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["generate", "nowhere", "--top-p", "2"], 1, "top_p=2.0: use a number above 0"),
        (["generate", "nowhere"], 1, "nowhere"),
        (["status", "nowhere"], 2, "nowhere: no run directory"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(words: list[str], code: int, says: str) -> None:
    (end,) = run_command(*words)
    assert end.code == code
    assert says in paragraph(end.output)
    assert REPORT_IT not in end.output
