"""What a step reports: metrics.jsonl, TensorBoard, a live line on a terminal, lines in logs."""

import contextlib
import json
import logging
import math
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from pretrain.records import METRICS
from pretrain.trackers import Tracker
from untrusted.errors import RecordError, UntrustedError
from untrusted.files import check_place, open_regular, write_durably
from untrusted.numbers import counted, number
from untrusted.records import MAX_LINE_BYTES, parse_json
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
    "measured_flop_utilisation": "speed/measured_flop_utilisation",
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
    """Rank 0's record of a run. On resume, entries after the step resumed from are dropped.

    A file that is removed while the run lasts is written again, with all entries.
    """

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
        self._lost: set[str] = set()  # what cannot be written, and has been reported
        self.path = run_dir / "metrics.jsonl"
        kept = _entries_before(self.path, first_step)
        write_durably(self.path, kept)
        self.file = self.path.open("a+b", buffering=0)
        self._size = len(kept)
        self._waiting = b""  # lines, or the end of one, that could not be written yet
        self._is_full = False
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
        self._show_progress(self.progress.start)

    def write(self, metrics: dict[str, Any]) -> None:
        """Record one step; `metrics` has "step" and any of the known names.

        None stands for what is not finite, which JSON has no word for.
        """
        line = _line(metrics)
        metrics = {name: value if _finite(value) else None for name, value in metrics.items()}
        self._write_line(json.dumps(metrics, allow_nan=False).encode() + b"\n")
        step = metrics["step"]
        self._spare_the_run("TensorBoard", lambda: self._add_scalars(metrics))
        for tracker in self.trackers:
            self._spare_the_run(type(tracker).__name__, partial(tracker.write, metrics))
        self._show_progress(
            partial(self.progress.update, self.task, completed=step, description=line)
        )
        if step % self.every == 0 or "validation_loss" in metrics:
            _log_line(line)

    def text(self, tag: str, text: str, step: int) -> None:
        """A note in TensorBoard, as Markdown."""
        if (board := self.tensorboard) is not None:
            note = redact(text)
            self._spare_the_run("TensorBoard", lambda: board.add_text(tag, note, step))

    def close(self) -> None:
        """Flush and release; the live line stays as it is."""
        self._show_progress(self.progress.stop)
        self._write_line(b"")
        self.file.close()
        if self._waiting:
            log.warning("%s lacks its last %d lines", self.path, self._waiting.count(b"\n"))
        if self.tensorboard is not None:
            self._spare_the_run("TensorBoard", self.tensorboard.close)

    def _write_line(self, line: bytes) -> None:
        """Append to metrics.jsonl, which is put back first where it was removed or replaced."""
        here = os.fstat(self.file.fileno())
        try:
            if fault := self._fault(here):
                self.file.close()
                self.file = self.path.open("a+b", buffering=0)
                log.warning("%s %s while the run lasted", self.path, fault)
                here = os.fstat(self.file.fileno())
        except (OSError, UntrustedError) as error:
            if self.path.name not in self._lost:
                self._lost.add(self.path.name)
                message = "%s was replaced and cannot be written (%s): training goes on"
                log.warning(message, self.path, error)
        self._waiting += line
        self._size = here.st_size
        try:
            while self._waiting:
                written = self.file.write(self._waiting)
                self._waiting = self._waiting[written:]
                self._size += written
        except OSError as error:
            if not self._is_full:
                self._is_full = True
                log.warning(
                    "%s cannot be written (%s): training goes on, and writes its lines once it can",
                    *(self.path, error),
                )
        else:
            self._is_full = False

    def _show_progress(self, action: Callable[[], None]) -> None:
        """The live line is in nobody's way: its terminal may be gone."""
        with contextlib.suppress(OSError):
            action()

    def _fault(self, here: os.stat_result) -> str:
        """What others have done to the file, which is written again if it is gone; else ""."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.path, os.pread(self.file.fileno(), here.st_size, 0))
            return "was removed: it is there again, with every step"
        check_place(self.path)
        if not os.path.samestat(there, here):
            return "was replaced: the next steps are appended to the new file"
        return "was cut: it lacks steps" if here.st_size < self._size else ""

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


def _entries_before(path: Path, first_step: int) -> bytes:
    """Lines of steps up to first_step; what a crash left of a line is dropped.

    Of a file with damaged lines a copy is kept beside it. Raises UnsafeFileError and OSError.
    """
    kept, faults, number = [], [], 0
    try:
        with open_regular(path, follow_link=True) as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                line = line.lstrip(b"\0")  # of a page that a crash left empty
                is_cut = not line.endswith(b"\n")
                try:
                    entry = parse_json(line, METRICS, f"{path}, line {number}", "it is left out")
                    if entry["step"] <= first_step and not is_cut:
                        kept.append(line)
                except RecordError as error:
                    if not is_cut or not line.startswith(b"{"):
                        faults.append(str(error))
    except FileNotFoundError:
        pass
    if faults:
        copy = path.with_name("metrics.damaged.jsonl")
        copy.unlink(missing_ok=True)
        shutil.copyfile(path, copy)
        lines = counted(len(faults), "such line")
        log.warning("%s (%s in all; %s is a copy of the file)", faults[0], lines, copy)
    return b"".join(kept)


def _line(metrics: dict[str, Any]) -> str:
    loss = "no loss" if metrics["loss"] is None else f"loss {number(metrics['loss'], 5)}"
    norm = "no gradient" if metrics["grad_norm"] is None else f"grad {number(metrics['grad_norm'])}"
    text = (
        f"step {number(metrics['step'])}  {loss}  {norm}  lr {metrics['lr']:.2e}  "
        f"{number(metrics['tokens_per_second'])} tok/s  "
        f"{number(metrics['memory_bytes'] / 2**30, 3)} GiB"
    )
    if metrics.get("validation_loss") is not None:
        text += f"  validation {number(metrics['validation_loss'], 5)}"
    return text


def _log_line(line: str) -> None:
    """To the log file, and to the console unless the live line already shows it."""
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler) or not console.is_terminal:
            handler.handle(record)
