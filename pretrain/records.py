"""What a run directory holds, in types: metrics, events, starts, samples left out."""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from untrusted.records import Count, Finite, read_state

Number = Annotated[int, Field(ge=-(2**63), lt=2**63)] | Finite
Metrics = dict[str, Any]
"""One step's: numbers, or None for what was not finite; "step" is a count."""


def _with_step(metrics: Metrics) -> Metrics:
    step = metrics.get("step")
    if not isinstance(step, int) or step < 0:
        raise ValueError("it has no step")
    return metrics


UTILISATION = ("model_flop_utilisation", "measured_flop_utilisation")
"""Metrics of GPUs: model FLOP/s as a share of the data sheet's, and of a product's as measured."""

METRICS: TypeAdapter[Metrics] = TypeAdapter(
    Annotated[dict[str, Number | None], AfterValidator(_with_step)]
)


How = Literal["done", "stopped", "failed"]
"""How a start ended: at the run's last step, when asked to (a signal, or the end of a job's time),
or by an error."""


class Event(TypedDict):
    """A line of events.jsonl; it may hold more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    event: str
    time: NotRequired[str]
    step: NotRequired[Count]
    said: NotRequired[str]
    how: NotRequired[How]
    """Of an "end"."""
    host: NotRequired[str]
    """Of a "start": where rank 0 runs, and its process there."""
    pid: NotRequired[Count]
    total_steps: NotRequired[Count]
    """Of a "start": the length of the run, whose batch size may have changed on the way."""
    total_tokens: NotRequired[Count]


class Start(TypedDict):
    """An entry of environment.json; it may hold more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    time: str
    host: str
    world_size: Count
    git_revision: str
    slurm_job_id: NotRequired[str]


EVENT = TypeAdapter(Event)
STARTS = TypeAdapter(list[Start])
WINDOWS = TypeAdapter(list[Annotated[list[Count], Field(min_length=2, max_length=2)]])


def read_starts(run_dir: Path) -> list[Start]:
    """Return the entries of environment.json; a run without that file has none.

    Raises RecordError and UnsafeFileError.
    """
    remedy = "remove the file to go on without the record of earlier starts"
    return read_state(run_dir / "environment.json", STARTS, remedy) or []
