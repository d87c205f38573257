"""What a step reports: metrics.jsonl, TensorBoard, a live line on a terminal, lines in logs."""

import contextlib
import json
import logging
import math
import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from pretrain.trackers import Tracker
from untrusted.secrets import redact

log = logging.getLogger("transxssm")
console = Console(stderr=True)

TENSORBOARD_GROUPS = {
    "loss": "train/loss",
    "perplexity": "train/perplexity",
    "validation_loss": "validation/loss",
    "validation_perplexity": "validation/perplexity",
    "validation_bits_per_byte": "validation/bits_per_byte",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "model_flops_per_second": "speed/model_flops_per_second",
    "model_flop_utilisation": "speed/model_flop_utilisation",
    "memory_bytes": "memory/peak_bytes",
    "skipped_shards": "data/skipped_shards",
    "skipped_updates": "events/skipped_updates",
    "rollbacks": "events/rollbacks",
    "stragglers": "events/stragglers",
    "time_data": "time/data",
    "time_forward_backward": "time/forward_backward",
    "time_step": "time/optimizer_step",
    "time_checkpoint": "time/checkpoint_stall",
}
# the first that fits; the rest is the name of a source, of a bin of positions, of a kind of layer
TENSORBOARD_PREFIXES = {
    "validation_loss_from_": "validation_by_position/loss_from_",
    "validation_loss_": "validation_by_set/loss_",
    "loss_": "train_by_source/loss_",
    "tokens_": "data/tokens_",
    "grad_norm_": "gradient_norm/",
    "weight_norm_": "weight_norm/",
    "update_ratio_": "update_ratio/",
    "activation_rms_": "activation_rms/",
    "ssd_": "ssd/",
}


class MetricsWriter:
    """Rank 0's record of a run. On resume, entries after the step resumed from are dropped."""

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        total_steps: int,
        every: int,
        tensorboard: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.every, self.trackers = every, trackers
        self._lost: set[str] = set()  # of TensorBoard and trackers
        path = run_dir / "metrics.jsonl"
        kept = _entries_before(path, first_step)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.rename(path)
        self.file: TextIO = path.open("a")
        self.tensorboard: SummaryWriter | None = None
        if tensorboard:
            self._spare_the_run("TensorBoard", lambda: self._open_tensorboard(run_dir, first_step))
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=total_steps, completed=first_step)
        self.progress.start()

    def write(self, metrics: dict[str, Any]) -> None:
        """Record one step; `metrics` has "step" and any of the known names.

        None stands for what is not finite, which JSON has no word for.
        """
        metrics = {name: value if _finite(value) else None for name, value in metrics.items()}
        self.file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self.file.flush()
        step = metrics["step"]
        self._spare_the_run("TensorBoard", lambda: self._add_scalars(metrics))
        for tracker in self.trackers:
            self._spare_the_run(type(tracker).__name__, partial(tracker.write, metrics))
        line = _line(metrics)
        self.progress.update(self.task, completed=step, description=line)
        if step % self.every == 0 or "validation_loss" in metrics:
            _log_line(line)

    def text(self, tag: str, text: str, step: int) -> None:
        """A note in TensorBoard, as Markdown."""
        if (board := self.tensorboard) is not None:
            note = redact(text)
            self._spare_the_run("TensorBoard", lambda: board.add_text(tag, note, step))

    def close(self) -> None:
        """Flush and release; the live line stays as it is."""
        self.progress.stop()
        self.file.close()
        if self.tensorboard is not None:
            self._spare_the_run("TensorBoard", self.tensorboard.close)

    def _open_tensorboard(self, run_dir: Path, first_step: int) -> None:
        folder = str(run_dir / "tensorboard")
        self.tensorboard = SummaryWriter(folder, purge_step=first_step + 1)

    def _add_scalars(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if self.tensorboard is not None and (tag := _tag(name)) and value is not None:
                self.tensorboard.add_scalar(tag, value, metrics["step"])

    def _spare_the_run(self, name: str, action: Callable[[], None]) -> None:
        """Do what only `name` suffers from: its first failure is reported and ends it."""
        if name in self._lost:
            return
        try:
            action()
        except (OSError, RuntimeError, ValueError) as error:
            self._lost.add(name)
            log.warning(
                "%s cannot be written (%s): training goes on; metrics.jsonl has every step",
                *(name, error),
            )


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _tag(name: str) -> str | None:
    """TensorBoard's name of a metric, or None if it does not go there."""
    if name in TENSORBOARD_GROUPS:
        return TENSORBOARD_GROUPS[name]
    for prefix, group in TENSORBOARD_PREFIXES.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return None


def peak_memory(device: torch.device) -> int:
    """Bytes: the device allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _entries_before(path: Path, first_step: int) -> list[str]:
    """Lines of steps up to first_step; what a crash left of a line is dropped."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # not JSON
            if line.endswith("\n") and json.loads(line)["step"] <= first_step:
                kept.append(line)
    return kept


def _line(metrics: dict[str, Any]) -> str:
    loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
    norm = "none" if metrics["grad_norm"] is None else f"{metrics['grad_norm']:.3f}"
    text = (
        f"step {metrics['step']}  loss {loss}  grad {norm}  "
        f"lr {metrics['lr']:.2e}  {metrics['tokens_per_second']:,.0f} tok/s  "
        f"{metrics['memory_bytes'] / 2**30:.1f} GiB"
    )
    if metrics.get("validation_loss") is not None:
        text += f"  validation {metrics['validation_loss']:.4f}"
    return text


def _log_line(line: str) -> None:
    """To the log file, and to the console unless the live line already shows it."""
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler) or not console.is_terminal:
            handler.handle(record)
