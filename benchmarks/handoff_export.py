"""What the rows of benchmarks.handoff share: the export, comparisons, and how rows are run.

The process has torch, transformers, peft and accelerate, and none of this project: once this is
imported, importing the project fails.
"""

import importlib.abc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = {"benchmarks", "checkpoints_tools", "data_pipeline", "parallel", "pretrain", "slurm"}
PROJECT |= {"tests", "untrusted", "kernels.ssd"}  # transformers looks for a package kernels


class Blocker(importlib.abc.MetaPathFinder):
    """Makes importing the project fail as if it were not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name in PROJECT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

Row = tuple[str, str, Callable[["Export"], float]]


class Export:
    """The folder, and what the plain call makes of it."""

    def __init__(self, folder: Path, *, plain: bool = True) -> None:
        self.folder = folder
        rng = torch.Generator().manual_seed(7)
        self.ids = torch.randint(2, 250, (2, 23), generator=rng)
        if not plain:
            return
        self.model = self.load()
        self.tied = self.model.config.tie_word_embeddings
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :9] = 0  # padded on the left
        with torch.no_grad():
            self.logits = self.model(self.ids).logits
            self.padded = self.model(self.ids, attention_mask=self.mask).logits
        self.grads = gradients(self.load().train(), input_ids=self.ids, labels=self.ids)

    def load(self, **arguments: Any) -> Any:
        arguments = {"dtype": torch.float32, **arguments}
        return AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=True, **arguments
        ).eval()

    def generated(self, model: Any, **arguments: Any) -> Tensor:
        """Six tokens after each row of the prompts, greedily."""
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        tokens: Tensor = model.generate(**settings, **arguments)
        return tokens


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value. Raises AssertionError on shapes."""
    assert found.shape == expected.shape, f"shape {found.shape}, not {expected.shape}"
    assert bool(found.isfinite().all()), "not finite"
    scale = float(expected.abs().max()) or 1.0
    return float((found.double() - expected.double()).abs().max()) / scale


def gradients(model: Any, **arguments: Any) -> dict[str, Tensor]:
    """By parameter, of the loss. Raises AssertionError where a parameter has none."""
    model.zero_grad()
    model(**arguments).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient of {missing[:3]}"
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any. Raises AssertionError when names differ."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:3]
    return max(difference(found[name], expected[name]) for name in expected)


def refused(message: str, call: Callable[[], Any]) -> None:
    """Raise AssertionError unless the call raises ValueError with this message."""
    problem = "not refused"
    try:
        call()
    except ValueError as error:
        problem = str(error)
    assert message in problem, problem


def row(
    rows: list[Row], item: str, name: str
) -> Callable[[Callable[[Export], float]], Callable[[Export], float]]:
    """Add a function of the export, which returns its largest relative difference, to `rows`."""

    def register(function: Callable[[Export], float]) -> Callable[[Export], float]:
        rows.append((item, name, function))
        return function

    return register


def run(rows: Sequence[Row], bound: float, arguments: list[str], *, plain: bool = True) -> int:
    """Run the rows that are named, or all that have not passed yet; 3 when one fails, else 0.

    arguments: EXPORT RESULTS [ROW ...]. A line of JSON is added to RESULTS for each row. plain:
    whether the rows compare with the plain call that `Export` makes.
    """
    folder, results, *names = arguments
    done = passed(Path(results))
    chosen = [r for r in rows if (r[1] in names if names else r[1] not in done)]
    if not chosen:
        return 0
    torch.set_num_threads(1)
    export = Export(Path(folder), plain=plain)
    failed = 0
    for item, name, function in chosen:
        begin = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                found, problem = function(export), ""
                if found > bound:
                    problem = f"differs by {found:.2e}"
            except Exception as error:
                last = (str(error).strip().splitlines() or [""])[-1]
                found, problem = float("nan"), f"{type(error).__name__}: {last}"
                traceback.print_exc()
        if rounded := [str(w.message) for w in caught if "TransXSSM" in str(w.message)]:
            problem = problem or rounded[0]
        entry = {"item": item, "row": name, "worst": found, "problem": problem}
        entry["seconds"] = time.perf_counter() - begin
        failed += bool(problem)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    return 3 if failed else 0


def passed(results: Path) -> set[str]:
    """Rows that an earlier call has put into the file of results without a problem."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    entries = [json.loads(line) for line in lines]
    return {entry["row"] for entry in entries if not entry["problem"]}
