"""Steps whose numbers are bad: their updates are left out, and data that keeps giving them too.

A step is bad when its loss or gradient norm is not finite, or larger than those of the good steps
before it by more than spike_deviations robust deviations (1.4826 times the median distance from the
median; of the norm's logarithm). All ranks have the same numbers, so all decide alike. After
bad_steps_in_a_row of them the run goes back to its newest checkpoint and passes over the samples of
these steps; after max_rollbacks of that it ends.
"""

import json
import logging
import math
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter
from typing_extensions import TypedDict

from pretrain.records import WINDOWS as WINDOWS_KIND
from pretrain.sections import TrainingConfig
from untrusted.files import write_durably
from untrusted.records import Finite, check_value, read_state
from untrusted.secrets import redact_message, redact_values

log = logging.getLogger("transxssm")

ROBUST = 1.4826  # median distance from the median → standard deviation of a normal distribution
LEAST = 0.01  # deviation, of the median: a window may hold equal numbers
EVENTS, WINDOWS = "events.jsonl", "skipped_windows.json"


def _is_bad_step(entry: list[Any]) -> list[Any]:
    if [type(part) for part in entry] != [int, int, str]:
        raise ValueError("it is not [step, sample, fault]")
    return entry


class _State(TypedDict):
    losses: list[Finite]
    log_norms: list[Finite]
    bad: list[Annotated[list[Any], AfterValidator(_is_bad_step)]]


STATE = TypeAdapter(_State)


@dataclass
class Judge:
    """The recent good steps, and the bad ones in a row."""

    config: TrainingConfig
    losses: deque[float] = field(init=False)
    log_norms: deque[float] = field(init=False)
    bad: list[tuple[int, int, str]] = field(default_factory=list)
    """Those in a row: step, its first sample, what is bad."""

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.config.spike_window)
        self.log_norms = deque(maxlen=self.config.spike_window)

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is bad about a step, or None."""
        for name, value, number, window in (
            ("loss", loss, loss, self.losses),
            ("gradient norm", grad_norm, _log(grad_norm), self.log_norms),
        ):
            if not math.isfinite(value):
                return f"{name} {value}"
            if (limit := self._limit(window)) is not None and number > limit:
                usual = statistics.median(window)
                usual = usual if window is self.losses else math.exp(usual)
                return f"{name} {value:.4g}, usually {usual:.4g}"
        return None

    def _limit(self, window: deque[float]) -> float | None:
        """Above which a number is a spike; None while too few are known."""
        deviations = self.config.spike_deviations
        if not deviations or len(window) < self.config.spike_window:
            return None
        middle = statistics.median(window)
        deviation = ROBUST * statistics.median(abs(number - middle) for number in window)
        return middle + deviations * max(deviation, LEAST * abs(middle), LEAST)

    def good(self, loss: float, grad_norm: float) -> None:
        """Take note of a good step."""
        self.losses.append(loss)
        self.log_norms.append(_log(grad_norm))
        self.bad.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "losses": list(self.losses),
            "log_norms": list(self.log_norms),
            "bad": self.bad,
        }

    def restore(self, state: dict[str, Any], source: str) -> None:
        """From a checkpoint, `source`. Raises RecordError."""
        check_value(state, STATE, f"{source}: judge", "use another checkpoint")
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.log_norms.clear()
        self.log_norms.extend(state["log_norms"])
        self.bad = [(step, sample, said) for step, sample, said in state["bad"]]


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30)) if math.isfinite(norm) else norm


# -- samples to pass over --------------------------------------------------------------------------

Windows = list[tuple[int, int]]
"""[first, end) in the run's samples, whole steps; in the order in which they were found bad."""


def read_windows(run_dir: Path) -> Windows:
    """Those that the run has recorded. Raises RecordError and UnsafeFileError."""
    remedy = "restore the file, or remove it to train on the samples that the run had left out"
    pairs = read_state(run_dir / WINDOWS, WINDOWS_KIND, remedy)
    return [(first, end) for first, end in pairs or []]


def write_windows(run_dir: Path, windows: Windows) -> None:
    """At once and whole: a run that dies before its next checkpoint passes over them, too."""
    write_durably(run_dir / WINDOWS, json.dumps(windows).encode())


def merged(windows: Windows, others: Windows) -> Windows:
    """Each once, the first list's first."""
    return list(dict.fromkeys([*windows, *others]))


def passed_to(sample: int, windows: Windows) -> int:
    """The sample to go on with: `sample`, or the end of the windows it lies in."""
    for first, end in sorted(windows):
        if first <= sample < end:
            sample = end
    return sample


def record_event(run_dir: Path, name: str, **fields: Any) -> None:
    """A line in events.jsonl, which keeps what going back takes out of the metrics; of rank 0.

    Where it cannot be written the run goes on without it.
    """
    shown = redact_values(fields, redact_message)
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": name, **shown}
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    flags |= os.O_NONBLOCK  # nor does it wait for a pipe's reader
    try:
        with os.fdopen(os.open(run_dir / EVENTS, flags, 0o666), "w") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        log.warning("%s cannot be written (%s): training goes on", run_dir / EVENTS, error)
