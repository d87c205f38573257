"""The nodes that a run's preflight has named: RUN/preflight.json, as the job script reads it."""

import re
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from untrusted.errors import RecordError
from untrusted.records import read_json
from untrusted.text import printable

PREFLIGHT = "preflight.json"
REMEDY = "remove it and submit the job again"


class Preflight(TypedDict):
    """What is read of it."""

    bad_nodes: dict[str, list[str]]


PREFLIGHT_RECORD = TypeAdapter(Preflight)


def named_nodes(run_dir: Path) -> list[str]:
    """Names of the bad nodes, which can stand in a command. Raises UntrustedError."""
    path = run_dir / PREFLIGHT
    try:
        names = list(read_json(path, PREFLIGHT_RECORD, REMEDY)["bad_nodes"])
    except FileNotFoundError as error:
        raise RecordError(f"{path} is missing: preflight has named no nodes") from error
    for name in names:
        if not re.fullmatch("[A-Za-z0-9_.][A-Za-z0-9_.-]*", name):
            raise RecordError(f"{path} names the node '{printable(name)[:100]}'; {REMEDY}.")
    return names
