"""Steps whose numbers are bad: their updates are left out, and data that keeps giving them too.

A step is bad when its loss or gradient norm is not finite, or larger than those of the good steps
before it by more than spike_deviations robust deviations (1.4826 times the median distance from the
median; of the norm's logarithm). All ranks have the same numbers, so all decide alike. After
bad_steps_in_a_row of them the run goes back to its newest checkpoint and passes over the samples of
these steps; after max_rollbacks of that it ends.
"""

import json
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config import TrainingConfig
from pretrain.credentials import redacted
from untrusted.secrets import redact_message

ROBUST = 1.4826  # median distance from the median → standard deviation of a normal distribution
LEAST = 0.01  # deviation, of the median: a window may hold equal numbers
EVENTS, WINDOWS = "events.jsonl", "skipped_windows.json"


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

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
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
    """Those that the run has recorded. Raises ValueError for a damaged file."""
    path = run_dir / WINDOWS
    if not path.exists():
        return []
    return [(int(first), int(end)) for first, end in json.loads(path.read_text())]


def write_windows(run_dir: Path, windows: Windows) -> None:
    """At once and whole: a run that dies before its next checkpoint passes over them, too."""
    temporary = run_dir / f"{WINDOWS}.tmp"
    temporary.write_text(json.dumps(windows))
    temporary.rename(run_dir / WINDOWS)


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
    """A line in events.jsonl, which keeps what going back takes out of the metrics; of rank 0."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "event": name,
        **redacted(fields, redact_message),
    }
    with (run_dir / EVENTS).open("a") as file:
        file.write(json.dumps(entry) + "\n")
