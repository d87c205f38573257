"""`transxssm report RUN`: one self-contained HTML page of a run, with its pictures.

Read from the run directory alone: metrics.jsonl, events.jsonl, environment.json, config.toml.
"""

import base64
import html
import io
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from untrusted.numbers import number

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pretrain.bad_steps import EVENTS
from pretrain.config import Config, ConfigError, load_config
from pretrain.console import literal, shown
from pretrain.records import EVENT, METRICS, UTILISATION, Event, Metrics, Start, read_starts
from pretrain.run_dir import check_run
from pretrain.starts import how_ended, last_start, totals
from untrusted.errors import UntrustedError
from untrusted.files import write_durably
from untrusted.records import T, read_json_lines

log = logging.getLogger("transxssm")

SECONDS = 1e9  # the longest that a phase takes
LARGEST = 1e100  # beyond which nothing is drawn
MAX_CURVES, MAX_MARKS = 40, 200  # of a picture
MAX_POINTS = 1500  # of a curve; more steps are averaged
PHASES = {
    "time_forward_backward": "forward and backward",
    "time_step": "optimizer",
    "time_data": "waiting for data",
    "time_checkpoint": "checkpoint stall",
    "time_vitals": "vitals",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
img { width: 100%; } table { border-collapse: collapse; }
td, th { text-align: left; padding: .2em 1.2em .2em 0; vertical-align: top; }
.facts { display: flex; flex-wrap: wrap; gap: .6em 2.4em; }
.facts div span { display: block; color: #777; font-size: .85em; }
pre { background: #f5f5f3; padding: 1em; overflow-x: auto; font-size: .85em; }
"""


@dataclass(frozen=True)
class Record:
    """What a run directory holds of a run."""

    run_dir: Path
    config: Config
    steps: list[Metrics]
    events: list[Event]
    starts: list[Start]

    def curve(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of a metric, where it has one; averaged to MAX_POINTS at most."""
        pairs = [
            (line["step"], value)
            for line in self.steps
            if (value := line.get(name)) is not None and abs(value) < LARGEST
        ]
        found = np.array(pairs, np.float64).reshape(-1, 2)
        parts = np.array_split(found, min(len(found), MAX_POINTS)) if len(found) else []
        means = np.array([part.mean(0) for part in parts]).reshape(-1, 2)
        return means[:, 0], means[:, 1]

    def names(self, prefix: str) -> list[str]:
        """Of the metrics that begin so, in the order of their appearance."""
        found = dict.fromkeys(name for line in self.steps for name in line)
        return [name for name in found if name.startswith(prefix)]

    def total(self, name: str) -> float:
        """Over all steps."""
        return float(sum(line.get(name) or 0.0 for line in self.steps))


def read_record(run_dir: Path) -> Record:
    """Read a run directory; damaged parts of its record are left out with a warning.

    Raises ConfigError where there is no run, or none of its steps.
    """
    check_run(run_dir)
    config = load_config(run_dir / "config.toml")
    steps = _lines(run_dir / "metrics.jsonl", METRICS)
    if not steps:
        raise ConfigError(f"{run_dir}: nothing to report yet, metrics.jsonl has no step")
    starts: list[Start] = []
    try:
        starts = read_starts(run_dir)
    except UntrustedError as error:
        log.warning("%s", error)
    return Record(run_dir, config, steps, _lines(run_dir / EVENTS, EVENT), starts)


def _lines(path: Path, kind: TypeAdapter[T]) -> list[T]:
    """Entries of a file that may just be written to."""
    lines = read_json_lines(path, kind)
    for fault in lines.faults[:1]:
        more = f" (and {len(lines.faults) - 1} more)" if len(lines.faults) > 1 else ""
        log.warning("%s%s", fault, more)
    return lines.entries


# -- pictures --------------------------------------------------------------------------------------


def picture(
    title: str,
    draw: Callable[[Any], None],
    record: Record,
    log: bool = False,
    over: str = "step",
) -> str:
    """An <img> of what `draw` puts on an axis, over steps, with the run's starts and rollbacks."""
    figure, axis = plt.subplots(figsize=(9.6, 3.2), layout="constrained")
    draw(axis)
    if log and any((np.asarray(line.get_ydata(), np.float64) > 0).any() for line in axis.lines):
        axis.set_yscale("log")
    for event in record.events[-MAX_MARKS:]:
        if not (step := event.get("step")):
            continue
        if event["event"] == "start":
            axis.axvline(step, color="#999", lw=0.8, ls=":")
        elif event["event"] in ("rollback", "update skipped"):
            color = "#c0392b" if event["event"] == "rollback" else "#e0a030"
            axis.axvline(step, color=color, lw=0.8, ls="--")
    axis.set_xlabel(over)
    axis.spines[["top", "right"]].set_visible(False)
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(fontsize=8, frameon=False, ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def lines(record: Record, names: Sequence[str], prefix: str = "") -> Callable[[Any], None]:
    """Draws metrics, each under its name without the prefix."""

    def draw(axis: Any) -> None:
        for name in names[:MAX_CURVES]:
            steps, values = record.curve(name)
            mark = "o" if len(steps) < 40 else ""
            label = literal(name.removeprefix(prefix).replace("_", " "))
            axis.plot(steps, values, lw=1.2, marker=mark, ms=3, label=label)
        if len(names) > MAX_CURVES:
            axis.plot([], [], " ", label=f"and {len(names) - MAX_CURVES:,} more")
        axis.ticklabel_format(useOffset=False)

    return draw


def from_zero(draw: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same, the axis from zero on."""

    def draw_it(axis: Any) -> None:
        draw(axis)
        axis.set_ylim(bottom=0)

    return draw_it


def loss(record: Record) -> Callable[[Any], None]:
    """Every step, their running mean, and the validation sets."""

    def draw(axis: Any) -> None:
        steps, values = record.curve("loss")
        axis.plot(steps, values, color="#9db8d2", lw=0.8, label="training")
        width = max(1, len(values) // 40)
        if width > 1:
            mean = np.convolve(values, np.ones(width) / width, "valid")
            middle = steps[width // 2 : width // 2 + len(mean)]
            axis.plot(middle, mean, color="#22405c", lw=1.5, label="running mean")
        steps, values = record.curve("validation_loss")
        if len(steps):
            axis.plot(steps, values, "o-", color="#c05a2b", ms=4, lw=1, label="validation")
        axis.set_ylabel("nats a token")

    return draw


def position_names(record: Record) -> list[str]:
    """Metrics of the validation loss from a position on."""
    return [n for n in record.names("") if re.fullmatch(r"validation_loss_from_[0-9]{1,9}", n)]


def by_position(record: Record) -> Callable[[Any], None]:
    """The first, a middle and the last evaluation."""
    names = position_names(record)[:MAX_CURVES]
    evaluated = [line for line in record.steps if names[0] in line]
    chosen = {0, len(evaluated) // 2, len(evaluated) - 1}

    def draw(axis: Any) -> None:
        for index in sorted(chosen):
            line = evaluated[index]
            here = [name for name in names if abs(line.get(name) or LARGEST) < LARGEST]
            begins = [int(name.rpartition("_")[2]) for name in here]
            places = [0 if begin == 0 else math.log2(begin) - 3 for begin in begins]
            axis.plot(
                places, [line[name] for name in here], "o-", ms=4, label=f"step {line['step']}"
            )
            axis.set_xticks(places, [f"{begin:,}" for begin in begins])
        axis.set_ylabel("nats a token")

    return draw


def time_shares(record: Record) -> Callable[[Any], None]:
    """What a step's time goes to."""
    names = [name for name in PHASES if record.names(name)]

    def draw(axis: Any) -> None:
        rows = [[line.get(name) or 0.0 for name in names] for line in record.steps]
        table = np.array(rows, np.float64).clip(0, SECONDS)
        steps = np.array([line["step"] for line in record.steps])
        count = min(len(steps), 200)
        parts = [part.mean(0) for part in np.array_split(table, count)]
        at = [part.mean() for part in np.array_split(steps, count)]
        axis.stackplot(at, np.array(parts).T, labels=[PHASES[name] for name in names], alpha=0.85)
        axis.set_ylabel("seconds a step")

    return draw


def pictures(record: Record) -> list[tuple[str, str]]:
    """Headings and images; of what the run has no figures for there is none."""

    def one(title: str, draw: Callable[[Any], None], log: bool = False) -> tuple[str, str]:
        return title, picture(title, draw, record, log)

    found = [one("Loss", loss(record))]
    known = {"loss", "validation_loss"}
    sources = [n for n in record.names("loss_") if n not in known]
    if sources:
        found.append(one("Loss by source", lines(record, sources, "loss_")))
    if position_names(record):
        title = "Validation loss by tokens of the document before"
        image = picture_by_position(record, title)
        found.append((title, image))
    found.append(one("Tokens per second", from_zero(lines(record, ["tokens_per_second"]))))
    if shares := [name for name in UTILISATION if record.names(name)]:
        found.append(one("Model FLOP utilisation", lines(record, shares)))
    if any(record.names(name) for name in PHASES):
        found.append(one("Where a step's time goes", time_shares(record)))
    found.append(one("Gradient norm", lines(record, ["grad_norm"]), log=True))
    found.append(one("Learning rate", lines(record, ["lr"])))
    for prefix, title, log in (
        ("update_ratio_", "Update over weight, by kind of layer", True),
        ("grad_norm_", "Gradient norm by kind of layer", True),
        ("weight_norm_", "Weight norm by kind of layer", True),
        ("activation_rms_", "Root mean square of what layers add", False),
        ("ssd_", "State-space layers: step Δ, decay, share of decays above 0.99", False),
    ):
        if names := record.names(prefix):
            found.append(one(title, lines(record, names, prefix), log))
    found.append(one("Peak memory, bytes", lines(record, ["memory_bytes"])))
    return found


def picture_by_position(record: Record, title: str) -> str:
    """Not over steps, so without the run's events."""
    bare = Record(record.run_dir, record.config, record.steps, [], [])
    return picture(title, by_position(bare), bare, over="tokens before")


# -- the page --------------------------------------------------------------------------------------


def facts(record: Record) -> dict[str, str]:
    """What the page says first."""
    last = record.steps[-1]
    validation = [line.get("validation_loss") for line in record.steps]
    evaluated = [loss for loss in validation if loss is not None]
    seconds = {name: record.total(name) for name in PHASES}
    whole = sum(seconds.values()) or 1.0
    rates = [rate for line in record.steps[-100:] if (rate := line.get("tokens_per_second"))]
    start, end = last_start(record.events)
    total, _ = totals(record.config, start)
    found = {
        "step": f"{number(last['step'])} of {number(total)}",
        "tokens": number(last.get("tokens") or 0),
        "parameters": number(record.config.model.num_params()["total"]),
        "training loss": number(last.get("loss"), 5),
        "validation loss": number(evaluated[-1], 5) if evaluated else "",
        "tokens/s": number(sum(rates) / len(rates) if rates else None),
        "starts": number(len(record.starts)),
        "last start": "" if end is None else f"{how_ended(end)}, {end.get('time', '')}",
        "updates skipped": number(last.get("skipped_updates", 0)),
        "rollbacks": number(last.get("rollbacks", 0)),
        "time in forward and backward": f"{seconds['time_forward_backward'] / whole:.1%}",
        "waiting for data": f"{seconds['time_data'] / whole:.2%}",
        "checkpoint stall": f"{seconds['time_checkpoint'] / whole:.2%}",
    }
    return {name: value for name, value in found.items() if value}


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """An HTML table."""
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{body}</table>"


def page(record: Record) -> str:
    """The whole report."""
    from pretrain.credentials import dump_recorded

    said = "".join(
        f"<div><span>{html.escape(name)}</span>{html.escape(value)}</div>"
        for name, value in facts(record).items()
    )
    images = "".join(f"<h2>{html.escape(t)}</h2>{image}" for t, image in pictures(record))
    events = [
        (e.get("time", ""), str(e.get("step", "")), e["event"], shown(str(e.get("said", ""))))
        for e in record.events
    ]
    starts = [
        (
            s["time"],
            s["host"],
            str(s["world_size"]),
            s.get("slurm_job_id", ""),
            s["git_revision"][:12],
        )
        for s in record.starts
    ]
    name = html.escape(str(record.run_dir))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{name}</title>"
        f"<style>{STYLE}</style></head><body><h1>{name}</h1><div class='facts'>{said}</div>"
        f"<p>Dotted lines: the run begins again. Dashed: an update left out (yellow), the run goes "
        f"back (red).</p>{images}"
        f"<h2>Events</h2>{table(events, ('time', 'step', 'event', ''))}"
        f"<h2>Starts</h2>{table(starts, ('time', 'host', 'ranks', 'job', 'revision'))}"
        f"<h2>Configuration</h2><pre>{html.escape(dump_recorded(record.config))}</pre>"
        "</body></html>\n"
    )


def write_report(run_dir: Path, out: Path) -> Path:
    """The page of a run, at `out`. Raises ConfigError."""
    text = page(read_record(run_dir))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, text.encode(errors="replace"))
    return out
