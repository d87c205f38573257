"""Whether a configuration goes on with a checkpoint's run, and what is another from here on.

Batch size and weights of the sources may change: the run's phases up to the checkpoint stay as they
were made, and a new phase begins with the next step. Its checkpoints record that phase, so that
later starts read the same samples.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import read_manifest
from data_pipeline.blend import Blend
from data_pipeline.config import DataConfig
from pretrain.config import Config
from pretrain.credentials import recorded
from pretrain.lr import learning_rate
from pretrain.phases import Phase, continued_phases, length, phase_at, run_phases
from pretrain.sections import OptimizerConfig
from pretrain.sources import stages_of, tokenizer_differences
from untrusted.secrets import redact_values

log = logging.getLogger("transxssm")

# Fields that only say how the same function is computed, from where it once began, or on how long
# sequences it was trained.
FREE_MODEL_FIELDS = {"chunk_size", "init_std", "max_position_embeddings"}
# Fields that change what is computed and leave every tensor its name and shape.
SAME_TENSORS = {"rope", "rope_theta", "rope_scaling", "rms_norm_eps"}
# With these the order of samples would no longer be that of one run.
ORDER_FIELDS = ("data.seed", "data.shuffle_window")
# Which samples a step reads: told by `_changes`.
PHASE_FIELDS = ("data.sources", "data.stages", "training.global_batch_size")
# Where things lie and how a run is watched says nothing of what it computes.
QUIET_FIELDS = ("checkpoint.", "logging.")
JUMP = 0.01  # of the learning rate, from which on it is reported


@dataclass(frozen=True)
class Start:
    """A checkpoint to go on from, and the run's phases as they are made from there."""

    folder: Path
    phases: tuple[Phase, ...]
    changes: str
    """Settings of the data that change with the next step, in words; or ""."""
    has_ended: bool
    """The run has made all of its steps."""


def check_same_run(folder: Path, config: Config, data: Blend) -> Start:
    """Report what is another than when the checkpoint was written. Rank 0 only.

    data: by the configuration's own stages. Raises CheckpointError for what must not change unless
    it is allowed.
    """
    manifest, step = read_manifest(folder), manifest_step(folder)
    there, here = redact_values(manifest["config"]), recorded(config)
    is_new = not manifest["samples"]  # imported or averaged: it has read no data
    made = (None if is_new else _phases_there(manifest, len(data.names))) or config.phases
    at = phase_at(made, step)
    counted = (manifest["samples"], manifest["tokens"])
    if counted != (ours := (at.samples_at(step), at.tokens_at(step))):
        raise CheckpointError(
            f"{folder} was trained on {counted[0]} samples, {counted[1]} tokens, but by "
            f"data.stages and training.global_batch_size step {step} comes after {ours[0]} and "
            f"{ours[1]}; restore what was changed of them, or choose another logging.run_dir (and "
            "checkpoint.load_weights_only for its weights)"
        )
    changed = differences(there, here)
    dangers = _dangers(folder, manifest, made, changed, data)
    _refuse(folder, manifest, dangers, config)
    try:
        training = config.training
        sizes = (training.global_batch_size, training.micro_batch_size)
        phases = tuple(continued_phases(made, config.data, *sizes, step))
    except ValueError as error:
        raise CheckpointError(f"{folder}, step {step}: {error}") from error
    continued = config.with_phases(phases)
    reported = {line for lines in dangers.values() for line in lines}
    for name, (old, new) in changed.items():
        line = _line(name, old, new)
        if line not in reported and not name.startswith((*QUIET_FIELDS, *PHASE_FIELDS)):
            log.info("changed since %s: %s", folder.name, line)
    has_ended = step >= continued.total_steps and manifest.get("unwritten_metrics") is None
    changes = _changes(at, phase_at(phases, step), data.names)
    if changes and not has_ended:
        log.warning("from step %d (sample %d) on: %s", step + 1, manifest["samples"], changes)
    if not has_ended and step:
        _tell_of_learning_rate(there, made, continued, step)
    return Start(folder, phases, changes, has_ended)


def manifest_step(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(read_manifest(folder)["step"])


def differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of two configuration trees that differ, by dotted name: (there, here)."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = differences(old, new)
            found |= {f"{name}.{field}": pair for field, pair in inner.items()}
        elif old != new:
            found[name] = (old, new)
    return found


def model_advice(fields: set[str], flag: str) -> str:
    """What to do about other [model] fields: `flag` where tensors may still fit."""
    names = {field.removeprefix("model.").partition(".")[0] for field in fields}
    if names <= SAME_TENSORS:
        return f"restore it, or go on with --checkpoint.{flag} true"
    shapes = ", ".join(f"model.{name}" for name in sorted(names - SAME_TENSORS))
    return f"restore it: {shapes} decides which tensors there are, and of what shape"


def _line(name: str, old: Any, new: Any) -> str:
    return f"{name}: {old!r} there, {new!r} here"


# -- phases ----------------------------------------------------------------------------------------


def _phases_there(manifest: dict[str, Any], sources: int) -> tuple[Phase, ...] | None:
    """The phases by which the run has read its data and would have gone on, or None where an older
    checkpoint does not tell. sources: how many there are now."""
    if "phases" in manifest:
        found = [
            Phase(**{**phase, "weights": tuple(phase["weights"])}) for phase in manifest["phases"]
        ]
    else:
        there = manifest["config"]
        try:
            data = DataConfig.model_validate(there["data"])
            training = there["training"]
            sizes = (training["global_batch_size"], training["micro_batch_size"])
            found = run_phases(data, *sizes)
        except (KeyError, TypeError, ValueError):
            return None
    # of other sources only how many samples were read is of use
    return tuple(found) if all(len(phase.weights) == sources for phase in found) else None


def _changes(before: Phase, now: Phase, names: list[str]) -> str:
    """What differs between the last step and the next, in words."""
    found = []
    if before.global_batch_size != now.global_batch_size:
        found.append(f"global_batch_size: {before.global_batch_size} → {now.global_batch_size}")
    if before.seq_len != now.seq_len:
        found.append(f"seq_len: {before.seq_len} → {now.seq_len}")
    pairs = zip(names, before.weights, now.weights, strict=True)
    weights = [f"{name} {old:g} → {new:g}" for name, old, new in pairs if old != new]
    return "; ".join(found + ([f"weights: {', '.join(weights)}"] if weights else []))


# -- what must not change --------------------------------------------------------------------------


def _dangers(
    folder: Path,
    manifest: dict[str, Any],
    made: tuple[Phase, ...],
    changed: dict[str, tuple[Any, Any]],
    data: Blend,
) -> dict[str, list[str]]:
    """Lines about changes that need a flag, by the flag's word. A checkpoint that has read no
    sample goes on with any data. Raises CheckpointError for changes that no flag allows."""
    found: dict[str, list[str]] = {"data": [], "tokenizer": [], "model": []}
    is_new = not manifest["samples"]
    for name, (old, new) in changed.items():
        section, _, field = name.partition(".")
        if is_new and section == "data":
            continue
        if name == "data.seq_len":
            raise CheckpointError(
                f"{folder} was trained with another {_line(name, old, new)}; restore it and list "
                "sources of the other length in data.sources, to be read from a point on by "
                "data.stages, or choose another logging.run_dir (and checkpoint.load_weights_only "
                "for its weights)"
            )
        if section == "model" and field.partition(".")[0] not in FREE_MODEL_FIELDS:
            found["model"].append(_line(name, old, new))
        elif name in ORDER_FIELDS:
            found["data"].append(_line(name, old, new))
    stages, there = stages_of(made), manifest["data_fingerprint"]
    same = {data.fingerprint_with(stages)}
    if manifest["tokenizer_hash"] != data.meta.tokenizer_hash:
        found["tokenizer"] += tokenizer_differences(folder, data)
        same.add(data.fingerprint_with(stages, manifest["tokenizer_hash"]))
    if there not in same and not is_new:
        found["data"] += _other_sources(manifest, data)
    return found


def _other_sources(manifest: dict[str, Any], data: Blend) -> list[str]:
    """A line for each source that is another."""
    there, here = manifest.get("sources", {}), data.fingerprints
    folders = dict(zip(data.names, (source.folder for source in data.sources), strict=True))
    lines = []
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if old != new and there:
            words = [f"{value[:12]}… {place}" if value else f"none {place}"
                     for value, place in ((old, "there"), (new, "here"))]  # fmt: skip
            lines.append(f"data of {folders.get(name, name)}: {', '.join(words)}")
    old, new, where = manifest["data_fingerprint"], data.fingerprint, data.sources[0].folder
    return lines or [f"data of {where}: {old[:12]}… there, {new[:12]}… here"]


def _refuse(
    folder: Path, manifest: dict[str, Any], dangers: dict[str, list[str]], config: Config
) -> None:
    for danger, lines in dangers.items():
        if not lines:
            continue
        message = f"{folder} was trained with another {danger} ({'; '.join(lines)})"
        if not getattr(config.checkpoint, f"allow_{danger}_change"):
            flag = f"allow_{danger}_change"
            fields = {line.partition(":")[0] for line in lines}
            advice = f"restore it, or go on with --checkpoint.{flag} true"
            raise CheckpointError(
                f"{message}; {model_advice(fields, flag) if danger == 'model' else advice}, or "
                "choose another logging.run_dir"
            )
        log.warning("%s; going on at sample %d", message, manifest["samples"])


# -- the learning rate -----------------------------------------------------------------------------


def _tell_of_learning_rate(
    there: dict[str, Any], made: tuple[Phase, ...], config: Config, step: int
) -> None:
    """Warn where the next update's rate is another than that of the schedule up to here."""
    try:
        before = OptimizerConfig.model_validate(there["optimizer"])
        training = there["training"]
        _, old_total = length(made, training["steps"], training["tokens"])
    except (KeyError, TypeError, ValidationError):  # of another version
        return
    optimizer, total = config.optimizer, config.total_tokens
    at = phase_at(made, step)
    planned = learning_rate(before, at.tokens_at(step + 1), old_total)
    last = learning_rate(before, at.tokens_at(step), old_total)
    now = learning_rate(optimizer, config.phase_at(step).tokens_at(step + 1), total)
    if abs(now - planned) <= JUMP * max(now, planned):
        return
    low = optimizer.lr * optimizer.min_lr_ratio
    rest = f"falls to {low:.3g} at step {config.total_steps}"
    if optimizer.schedule == "wsd":
        begin = total * (1 - optimizer.decay_fraction)
        decay = next(p for p in reversed(config.phases) if p.first_token <= begin)
        if (first := decay.step_of_token(int(begin))) > step:
            rest = f"stays at {optimizer.lr:.3g} up to step {first}, and then {rest}"
    log.warning(
        "the learning rate was %.3g at step %d and is %.3g at step %d (by the schedule of before: "
        "%.3g): the run's length, batch or [optimizer] has changed. From there it %s. To go on at "
        "another rate, change optimizer.lr or optimizer.schedule",
        *(last, step, now, step + 1, planned, rest),
    )
