"""Counts as they were when last accepted, kept beside the code so that a change shows.

    transxssm kernels launches configs/320m.toml --update

accepts those of a configuration, recorded under the name of its file, and rewrites the table in
docs/launches.md.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from parallel.ledger import Tally
from pretrain.launches import Counts

PATH = Path(__file__).with_name("launches_golden.json")
PAGE = PATH.parents[1] / "docs" / "launches.md"
BEGIN, END = "<!-- counts -->\n", "<!-- end of counts -->\n"
LIBRARIES = ("torch", "deepspeed", "megatron-core")
Entries = dict[str, dict[str, float]]  # "ssd layers | mixer | forward" -> numbers


def versions() -> dict[str, str]:
    """Of the libraries, which issue operations of their own."""
    return {name: importlib.metadata.version(name).split("+")[0] for name in LIBRARIES}


def entries(counts: Counts) -> Entries:
    """Operations by name, bytes and waits of every place of a micro-batch and of the step."""
    found: Entries = {
        f"{place.layer + ' layers' if place.layer else 'a micro-batch'} | {place.part} | "
        f"{place.direction}": _numbers(tally)
        for place, tally in counts.micro_batch.items()
    }
    found |= {f"once a step | {part}": _numbers(t) for part, t in counts.once.items()}
    return found | {"summary": {key: round(n, 3) for key, n in counts.summary().items()}}


def _numbers(tally: Tally) -> dict[str, float]:
    return {"bytes": tally.bytes, "waits": tally.waits, **dict(sorted(tally.kinds.items()))}


def changes(name: str, counts: Counts, path: Path) -> list[str]:
    """How `counts` differ from the golden ones of the configuration `name`, in sentences."""
    document, found = _document(path), entries(counts)
    recorded: Entries = document["configurations"].get(name, {})
    changed = []
    if document["versions"] != versions():
        changed.append(f"golden counts are of {document['versions']}, these of {versions()}")
    for key in sorted(found.keys() | recorded.keys()):
        before, now = recorded.get(key, {}), found.get(key, {})
        fields = sorted(f for f in before.keys() | now.keys() if before.get(f, 0) != now.get(f, 0))
        if fields:
            different = [
                f"{field} {before.get(field, 0)} → {now.get(field, 0)}" for field in fields
            ]
            changed.append(f"{key}: {', '.join(different)}")
    return changed


def recorded(path: Path) -> list[str]:
    """Names of the configurations that have golden counts."""
    return sorted(_document(path)["configurations"])


def recorded_versions(path: Path) -> dict[str, str]:
    """Of the libraries under which the golden counts were made."""
    found: dict[str, str] = _document(path)["versions"]
    return found


def write(name: str, counts: Counts, path: Path) -> None:
    """Replace the golden counts of the configuration `name`; one line an entry."""
    configurations = _document(path)["configurations"] | {name: entries(counts)}
    blocks = []
    for key, found in sorted(configurations.items()):
        lines = [f"      {json.dumps(k)}: {json.dumps(n)}" for k, n in sorted(found.items())]
        blocks.append(f"    {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n    }")
    head = f'{{\n  "versions": {json.dumps(versions())},\n  "configurations": {{\n'
    path.write_text(head + ",\n".join(blocks) + "\n  }\n}\n")


def table(path: Path) -> str:
    """The summaries of all recorded configurations, in Markdown."""
    found = {name: e["summary"] for name, e in _document(path)["configurations"].items()}
    rows = dict.fromkeys(key for summary in found.values() for key in summary)
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for row in rows:
        numbers = [f"{s[row]:,.4g}" if s[row] % 1 else f"{s[row]:,.0f}" for s in found.values()]
        lines.append(f"| {row.replace('_', ' ')} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def write_page(path: Path, page: Path) -> None:
    """Replace the table in the documentation, where it is at hand."""
    if page.exists():
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(path)}\n{END}{rest.split(END)[1]}")


def _document(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"versions": {}, "configurations": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found
