"""Pictures of an evaluation, as PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pretrain.console import literal
from pretrain.evaluation.probes import Cell
from pretrain.evaluation.scores import Scores
from untrusted.files import write_durably

INK = "#22405c"


def heat_map(cells: Sequence[Cell], rows: str, title: str, path: Path) -> None:
    """Two panels over context length: what share was found, and what it gained."""
    down, across = sorted({c.row for c in cells}), sorted({c.column for c in cells})
    figure, axes = plt.subplots(
        1, 2, figsize=(3 + 1.5 * len(across), 1.6 + 0.55 * len(down)), layout="constrained"
    )
    panels = (
        ("share of the answer that is likeliest", [c.found for c in cells], 0.0, 1.0),
        ("nats a token gained", [c.gain for c in cells], 0.0, max(1.0, *(c.gain for c in cells))),
    )
    for axis, (name, values, low, high) in zip(axes, panels, strict=True):
        grid = np.full((len(down), len(across)), np.nan)
        for cell, value in zip(cells, values, strict=True):
            grid[down.index(cell.row), across.index(cell.column)] = value
        shown = axis.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                dark = value < (low + high) / 2
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(across)), [f"{n:,}" for n in across])
        axis.set_yticks(range(len(down)), [f"{n:g}" for n in down])
        axis.set_xlabel("context, tokens")
        axis.set_ylabel(rows)
        figure.colorbar(shown, ax=axis)
    figure.suptitle(literal(title), fontsize=11)
    _save(figure, path)


def loss_by_position(scores: dict[tuple[int, int], Scores], title: str, path: Path) -> None:
    """Perplexity by how many tokens of its document a token has before it."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    edges = [begin for begin, _ in scores] + [max(end for _, end in scores)]
    axis.stairs([s.perplexity for s in scores.values()], range(len(edges)), color=INK, lw=2)
    for place, one in enumerate(scores.values()):
        axis.annotate(
            f"{one.perplexity:.1f}", (place + 0.5, one.perplexity), fontsize=8, ha="center",
            xytext=(0, 3), textcoords="offset points",
        )  # fmt: skip
    axis.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges])
    axis.set_xlabel("tokens of the document before it")
    axis.set_ylabel("perplexity")
    axis.set_ylim(bottom=0, top=1.15 * max(one.perplexity for one in scores.values()))
    axis.set_title(literal(title), fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    plt.close(figure)
    write_durably(path, content.getvalue())
