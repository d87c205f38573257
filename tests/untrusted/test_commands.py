"""Commands that print too much, nothing, or for ever."""

import subprocess
import time

import pytest

from untrusted import commands
from untrusted.commands import run_bounded


def test_both_streams_and_the_exit_code_arrive() -> None:
    done = run_bounded(
        ["sh", "-c", r"printf 'a\377'; echo $X >&2; exit 3"], timeout=10, environment={"X": "b"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\ufffd", "b\n")


@pytest.mark.parametrize("script", ["yes", "yes >&2", "yes & wait", "yes & exit 0"])
def test_endless_output_is_ended(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MAX_OUTPUT_BYTES", 1 << 20)
    begin = time.monotonic()
    with pytest.raises(subprocess.SubprocessError, match="sh printed more than 1 MiB"):
        run_bounded(["sh", "-c", script], timeout=30)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("script", ["sleep 60", "sleep 60 & exit 0"])
def test_what_does_not_end_is_a_timeout(script: str) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_bounded(["sh", "-c", script], timeout=0.5)


def test_what_cannot_be_run_is_an_error_of_the_system() -> None:
    with pytest.raises(FileNotFoundError):
        run_bounded(["/no/such/command"], timeout=1)
