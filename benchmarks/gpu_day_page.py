"""The outcomes of `benchmarks.gpu_day` as tables in Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from untrusted.files import write_durably

BEGIN, END = "<!-- gpu_day: begin -->", "<!-- gpu_day: end -->"
TITLES = {
    "self_check": "The kernels' tests, compiled",
    "training_320m": "Training steps at 4,096 tokens, 320M",
    "training_320m_long": "Training steps at 16,384 tokens, 320M",
    "training_1_3b": "Training steps at 4,096 tokens, 1.3B",
    "compiled_320m": "Training steps at 4,096 tokens, 320M, layers compiled",
    "profile_320m": "Where a step of 320M goes",
    "launch_floor": "What a launch costs",
    "layers": "A layer, forward and backward: issued by the host, and replayed as a CUDA graph",
    "scans": "The scan and SDPA, forward and backward, 4,096 tokens, bf16, replayed",
    "products": "Gradients of weights, 32,768 tokens, bf16",
    "head": "Output head and loss, forward and backward",
    "untried": "The demo on the GPU, against the CPU",
    "tuning": "Tiles of the scan",
}


def page(outcomes: Sequence[dict[str, Any]]) -> str:
    """One table a measurement. Figures of a dry run are marked as such."""
    if not outcomes:
        return "Nothing was measured.\n"
    parts = []
    if any(outcome["stand_in"] for outcome in outcomes):
        parts.append(
            "**Stand-in numbers: measured on a CPU at sizes without meaning, to show that the list "
            "runs. None of them says anything about a GPU.**"
        )
    where = {(outcome["device"], outcome["software"]) for outcome in outcomes}
    parts += [f"On one {device}: {software}." for device, software in sorted(where)]
    for outcome in outcomes:
        title = TITLES.get(outcome["name"], outcome["name"])
        if outcome["error"]:
            last = outcome["error"].strip().splitlines()[-1]
            parts.append(f"**{title}.** Failed: `{last[:300]}`")
        else:
            parts.append(f"**{title}.**\n\n{table(outcome['rows'])}")
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [number(row.get(name)).replace("|", "\\|") for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: Any) -> str:
    """Three significant digits at least, thousands apart."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def put_into(document: Path, outcomes: Sequence[dict[str, Any]]) -> None:
    """Replace what is between the document's two comments.

    Raises ValueError for figures of a dry run, and where the document lacks the comments.
    """
    if any(outcome["stand_in"] for outcome in outcomes):
        raise ValueError(f"{document}: figures of a dry run belong into no document")
    text = document.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        raise ValueError(f"{document}: there is no place for the tables; put in {BEGIN} and {END}")
    content = f"{before}{BEGIN}\n\n{page(outcomes)}\n{END}{after}"
    write_durably(document, content.encode())
