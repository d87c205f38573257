"""What a run starts from: the newest sound checkpoint, checked against configuration and data."""

import logging
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
from checkpoints_tools.stored import StoredTensors
from data_pipeline.blend import Blend
from parallel.groups import from_rank_0
from parallel.zero import ZeroOptimizer
from pretrain import run_lock
from pretrain.bad_steps import Windows, write_windows
from pretrain.config import Config
from pretrain.lost_checkpoints import keep_record, record_saves
from pretrain.same_run import FREE_MODEL_FIELDS, Start, check_same_run, differences, model_advice
from pretrain.sources import tokenizer_differences

log = logging.getLogger("transxssm")


def find_start(config: Config, data: Blend) -> Start | None:
    """The checkpoint to go on from, by checkpoint.resume, sound to its last byte. A collective.

    `auto` passes over damaged ones with a warning that names the file. Raises CheckpointError, on
    every rank, when the checkpoint is of another model, tokenizer or data and the configuration
    does not allow it, or when `none` would mix two runs in one folder.
    """
    candidates = from_rank_0(lambda: _candidates(config))
    for number, candidate in enumerate(candidates):
        fault = _fault(candidate)
        if fault is None:
            return from_rank_0(lambda: check_same_run(candidate, config, data))  # noqa: B023 (now)
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
    """The newest sound checkpoint of at most this step. A collective."""

    def earlier() -> list[Path]:
        steps = folders.committed_steps(folder)
        return [folders.step_folder(folder, s) for s in reversed(steps) if s <= last_step]

    for candidate in from_rank_0(earlier):
        if (fault := _fault(candidate)) is None:
            return candidate
        log.warning("passing over a damaged checkpoint: %s", fault)
    return None


def go_back(config: Config, start: Path, last_step: int, windows: Windows) -> None:
    """Make a checkpoint the one that the run goes on from, its later ones after `last_step` being
    removed, and exclude samples from now on. Rank 0 only.

    May be cut off anywhere: what a later start finds is whole, and leads past the same samples.
    """
    write_windows(Path(config.logging.run_dir), windows)
    record_saves(config, last_step=last_step)
    folders.go_back_to(config.checkpoint_dir, start, last_step)


def _candidates(config: Config) -> list[Path]:
    """Step folders to try, the best first."""
    folder, resume = config.checkpoint_dir, config.checkpoint.resume
    try:
        if folder.is_dir():
            run_lock.hold(folder)  # a run with another run_dir may save there
        folders.remove_temporary(folder)
        steps = folders.committed_steps(folder)
        keep_record(config, steps)  # before a folder is made where another is to be mounted
        folder.mkdir(parents=True, exist_ok=True)
        run_lock.hold(folder)
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
        model, tokenizer_hash = model_section(read_config(folder), folder), ""
    else:
        manifest = read_manifest(folder)
        model, tokenizer_hash = manifest["config"]["model"], manifest["tokenizer_hash"]
    lines: dict[str, list[str]] = {"model": [], "tokenizer": []}
    for name, (old, new) in differences(model, config.model.model_dump(mode="json")).items():
        if name.partition(".")[0] not in FREE_MODEL_FIELDS:
            lines["model"].append(f"model.{name}: {old!r} there, {new!r} here")
    if tokenizer_hash != data.meta.tokenizer_hash:
        lines["tokenizer"] = tokenizer_differences(folder, data)
    for danger, found in lines.items():
        if not found:
            continue
        said = f"the weights of {folder} are of another {danger} ({'; '.join(found)})"
        flag = f"allow_{danger}_change"
        if not getattr(config.checkpoint, flag):
            advice = f"restore it, or go on with --checkpoint.{flag} true"
            if danger == "model":
                advice = model_advice({line.partition(":")[0] for line in found}, flag)
            raise CheckpointError(f"{said}; {advice}")
        log.warning("%s", said)
    return exported, folder
