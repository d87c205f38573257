"""What a run starts from: the newest sound checkpoint, checked against configuration and data."""

import hashlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.exported_weights import load_exported_weights
from checkpoints_tools.importing import model_section, read_config
from checkpoints_tools.manifest import damaged_files, listed, read_manifest
from checkpoints_tools.safetensors_files import is_exported
from checkpoints_tools.sharded import load_stored_weights
from checkpoints_tools.single_gpu import ModelError
from checkpoints_tools.stored import StoredTensors
from checkpoints_tools.tokenizer_file import TOKENIZER, read_tokenizer
from data_pipeline.blend import Blend
from parallel.groups import from_rank_0
from parallel.zero import ZeroOptimizer
from pretrain.config import Config
from pretrain.credentials import recorded
from pretrain.lost_checkpoints import keep_record
from untrusted.secrets import redact_values

log = logging.getLogger("transxssm")

# Fields that only say how the same function is computed, from where it once began, or on how long
# sequences it was trained.
FREE_MODEL_FIELDS = {"chunk_size", "init_std", "max_position_embeddings"}
# With these the order of samples or the schedule would no longer be that of one run.
ORDER_FIELDS = ("data.seed", "data.shuffle_window")
FIXED_FIELDS = ("data.seq_len", "training.global_batch_size")
# Where things lie and how a run is watched says nothing of what it computes.
QUIET_FIELDS = ("checkpoint.", "logging.")


def find_start(config: Config, data: Blend) -> Path | None:
    """The checkpoint to go on from, by checkpoint.resume, sound to its last byte. A collective.

    `auto` passes over damaged ones with a warning that names the file. Raises CheckpointError, on
    every rank, when the checkpoint is of another model, tokenizer or data and the configuration
    does not allow it, or when `none` would mix two runs in one folder.
    """
    candidates = from_rank_0(lambda: _candidates(config))
    for number, candidate in enumerate(candidates):
        fault = _fault(candidate)
        if fault is None:
            from_rank_0(lambda: _check_same_run(candidate, config, data))  # noqa: B023 (called now)
            return candidate
        if candidate.parent.resolve() != config.checkpoint_dir.resolve():
            raise CheckpointError(fault)
        if dist.get_rank() == 0:
            before = "; trying the one before" if number + 1 < len(candidates) else ""
            log.warning("SKIPPING A DAMAGED CHECKPOINT: %s%s", fault, before)
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {config.checkpoint_dir} is sound; "
            "restore one, or choose another logging.run_dir to start anew"
        )
    return None


def newest_sound(folder: Path, last_step: int) -> Path | None:
    """The newest sound checkpoint of at most this step; later ones are removed. A collective."""

    def earlier() -> list[Path]:
        steps = folders.committed_steps(folder)
        for step in steps:
            if step > last_step:
                log.warning("removing %s, of steps that are made anew", step)
                shutil.rmtree(folders.step_folder(folder, step))
        return [folders.step_folder(folder, s) for s in reversed(steps) if s <= last_step]

    for candidate in from_rank_0(earlier):
        if (fault := _fault(candidate)) is None:
            return candidate
        log.warning("passing over a damaged checkpoint: %s", fault)
    return None


def _candidates(config: Config) -> list[Path]:
    """Step folders to try, the best first."""
    folder, resume = config.checkpoint_dir, config.checkpoint.resume
    try:
        folders.remove_temporary(folder)
        steps = folders.committed_steps(folder)
        keep_record(config, steps)  # before a folder is made where another is to be mounted
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # now, rather than at the first save
            pass
        if (folder / folders.LATEST).is_dir():
            raise IsADirectoryError(f"{folder / folders.LATEST} is a folder; remove it")
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.dir {folder} cannot be written ({error}); mend its permissions, free "
            "space, or name another folder"
        ) from error
    if resume == "none":
        if steps:
            raise CheckpointError(
                f'checkpoint.resume="none", but {folder} holds checkpoints up to step {steps[-1]}; '
                'choose another logging.run_dir, or checkpoint.resume="auto" to go on from them'
            )
        return []
    found = [folders.step_folder(folder, s) for s in reversed(steps)]
    if resume != "auto" and found and not Path(resume).exists():
        log.warning(
            "checkpoint.resume=%s is not there; going on from the run's own, of step %d",
            *(resume, steps[-1]),
        )
    elif resume != "auto":
        named = folders.resolve(Path(resume))
        if named.resolve() in {path.resolve() for path in found[1:]}:
            raise CheckpointError(
                f"checkpoint.resume={named}, but the run has later checkpoints, up to step "
                f'{steps[-1]}; move those away to go back to it, or use checkpoint.resume="auto"'
            )
        if not found:  # else the run goes on from its own
            return [named]
    return found


def _fault(candidate: Path) -> str | None:
    """Why a checkpoint is not sound; all ranks read it, each a share of its files. A collective."""
    manifest, fault = from_rank_0(lambda: _manifest_or_fault(candidate))
    if manifest is None:
        return str(fault)
    names = sorted(manifest["files"])[dist.get_rank() :: dist.get_world_size()]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, damaged_files(candidate, manifest, names))
    faults = {name: what for share in found for name, what in share.items()}
    said = [f"{candidate / name} {what}" for name, what in sorted(faults.items())]
    return listed(said) if said else from_rank_0(lambda: _index_fault(candidate, manifest))


def _manifest_or_fault(candidate: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        return read_manifest(candidate), ""
    except CheckpointError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{candidate}: {error}"


def _index_fault(candidate: Path, manifest: dict[str, Any]) -> str | None:
    """What is wrong with the index, or with what the manifest does not list, if anything is."""
    try:
        StoredTensors(candidate, manifest["files"])
    except CheckpointError as error:
        return str(error)
    return None


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


def _check_same_run(candidate: Path, config: Config, data: Blend) -> None:
    """Of rank 0: show what is another than when the checkpoint was written, refuse what must not be
    unless it is allowed."""
    manifest, allow = read_manifest(candidate), config.checkpoint
    phase, step = config.phase_at(manifest["step"]), manifest["step"]
    counted = (manifest["samples"], manifest["tokens"])
    if counted != (ours := (phase.samples_at(step), phase.tokens_at(step))):
        raise CheckpointError(
            f"{candidate} was trained on {counted[0]} samples, {counted[1]} tokens, but by "
            f"data.stages and training.global_batch_size step {step} comes after {ours[0]} and "
            f"{ours[1]}; restore what was changed of them, or choose another logging.run_dir (and "
            "checkpoint.load_weights_only for its weights)"
        )
    changed = differences(redact_values(manifest["config"]), recorded(config))
    shown = {name: f"{name}: {old!r} there, {new!r} here" for name, (old, new) in changed.items()}
    dangers: dict[str, list[str]] = {"data": [], "tokenizer": [], "model": []}
    for name, line in shown.items():
        if name in FIXED_FIELDS:
            raise CheckpointError(
                f"{candidate} was trained with another {line}. The order of the data and the "
                "schedule would no longer be those of one run; restore it, or choose another "
                "logging.run_dir (and checkpoint.load_weights_only for its weights)"
            )
        section, _, field = name.partition(".")
        if section == "model" and field not in FREE_MODEL_FIELDS:
            dangers["model"].append(line)
        elif name in ORDER_FIELDS:
            dangers["data"].append(line)
    for danger, there, here in (
        ("data", manifest["data_fingerprint"], data.fingerprint),
        ("tokenizer", manifest["tokenizer_hash"], data.meta.tokenizer_hash),
    ):
        if there != here:
            where = data.sources[0].folder
            dangers[danger].append(f"{danger} of {where}: {there[:12]}… there, {here[:12]}… here")
    for danger, lines in dangers.items():
        if not lines:
            continue
        said = f"{candidate} was trained with another {danger} ({'; '.join(lines)})"
        if not getattr(allow, f"allow_{danger}_change"):
            raise CheckpointError(
                f"{said}; restore it, choose another logging.run_dir, or go on with "
                f"--checkpoint.allow_{danger}_change true"
            )
        log.warning("%s; going on at sample %d", said, manifest["samples"])
    told = {line for lines in dangers.values() for line in lines}
    for name, line in shown.items():
        if line not in told and not name.startswith(QUIET_FIELDS):
            log.info("changed since %s: %s", candidate.name, line)


def load_weights(config: Config, data: Blend, zero: ZeroOptimizer) -> None:
    """Begin with the weights of checkpoint.load_weights_only, a checkpoint or an exported model.

    Raises CheckpointError, on every rank, where they are damaged, or of another model or tokenizer
    and the configuration does not allow it. A collective.
    """
    source = Path(config.checkpoint.load_weights_only)
    exported, folder = from_rank_0(lambda: _weights_source(source, config, data))
    if exported:
        load_exported_weights(folder, zero)
        return
    if (fault := _fault(folder)) is not None:
        raise CheckpointError(fault)
    load_stored_weights(folder, zero)


def _weights_source(source: Path, config: Config, data: Blend) -> tuple[bool, Path]:
    """Whether it is an exported model, and its folder; of rank 0."""
    exported = is_exported(source)
    folder = source if exported else folders.resolve(source)
    if exported:
        model = model_section(read_config(folder), folder)
        try:
            tokenizer = hashlib.sha256(read_tokenizer(folder / TOKENIZER)).hexdigest()
        except ModelError as error:
            raise CheckpointError(str(error)) from error
    else:
        manifest = read_manifest(folder)
        model, tokenizer = manifest["config"]["model"], manifest["tokenizer_hash"]
    lines: dict[str, list[str]] = {"model": [], "tokenizer": []}
    for name, (old, new) in differences(model, config.model.model_dump(mode="json")).items():
        if name.partition(".")[0] not in FREE_MODEL_FIELDS:
            lines["model"].append(f"model.{name}: {old!r} there, {new!r} here")
    if tokenizer != (ours := data.meta.tokenizer_hash):
        lines["tokenizer"].append(f"{tokenizer[:12]}… there, {ours[:12]}… here")
    for danger, found in lines.items():
        if not found:
            continue
        said = f"the weights of {folder} are of another {danger} ({'; '.join(found)})"
        if not getattr(config.checkpoint, f"allow_{danger}_change"):
            raise CheckpointError(
                f"{said}; restore it, or go on with --checkpoint.allow_{danger}_change true"
            )
        log.warning("%s", said)
    return exported, folder
