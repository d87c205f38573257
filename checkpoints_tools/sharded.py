"""Save and load the sharded training state: float32 weights, Adam moments, RNG, counters.

Every rank writes the fragments it owns (ZeRO) under the global parameter names; of ranks that hold
the same values (replicated parameters, the tied embedding's copy) one writes. Model weights in bf16
are the rounded float32 ones, so they are not stored twice.
"""

import contextlib
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.global_tensors import (
    GlobalTensor,
    LoadPlanner,
    Part,
    SavePlanner,
    global_parts,
)
from checkpoints_tools.manifest import read_manifest
from parallel.groups import from_rank_0, replicas_group
from parallel.zero import ZeroOptimizer

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path,
    step: int,
    zero: ZeroOptimizer,
    state: dict[str, Any],
    *,
    tokenizer: Path,
    keep_last: int,
    keep_every: int,
) -> Path:
    """Write step-N, commit it, remove old ones. A collective of all ranks.

    state: what else a resumed run needs (JSON); tokenizer: file that travels along. Raises
    CheckpointError on every rank when any of them failed; earlier checkpoints are untouched then.
    """
    temporary = folders.step_folder(folder, step).with_suffix(".tmp")

    def begin() -> None:
        folders.begin(folder, step)
        folders.write_durably(temporary / "tokenizer.json", tokenizer.read_text("utf-8"))

    _on_rank_0(begin, f"cannot begin {temporary}", folder)
    tensors: dict[str, Any] = _owned_tensors(zero, for_saving=True)
    tensors[f"rng.{dist.get_rank()}"] = _rng_state()
    try:
        dcp.save(tensors, storage_writer=FileSystemWriter(temporary), planner=SavePlanner())
    except (CheckpointException, OSError) as error:
        cause = f"{_causes(error)}{_free_space(folder)}"
        _on_rank_0(lambda: folders.remove_temporary(folder), f"cannot clean up {folder}", folder)
        raise CheckpointError(
            f"saving {temporary} failed: {cause}; earlier checkpoints are intact"
        ) from error
    state = state | {
        "adam_step": zero.adam_step(),
        "world_size": dist.get_world_size(),
    }

    def finish() -> None:
        _check_all_files_here(temporary)
        folders.commit(folder, step, state)
        folders.remove_old(folder, step, keep_last, keep_every)

    _on_rank_0(finish, f"committing {temporary} failed", folder)
    return folders.step_folder(folder, step)


def load_checkpoint(step_dir: Path, zero: ZeroOptimizer) -> dict[str, Any]:
    """Fill weights, moments, RNG from a committed checkpoint of any layout; returns its state.

    Raises CheckpointError when it is damaged or of another model.
    """
    state = read_manifest(step_dir)
    tensors: dict[str, Any] = _owned_tensors(zero, for_saving=False)
    reader = FileSystemReader(step_dir)
    rng_name = f"rng.{dist.get_rank()}"
    try:
        stored = reader.read_metadata().state_dict_metadata
        _check_names(step_dir, set(tensors), {n for n in stored if not n.startswith("rng.")})
        rng = _rng_state()
        if getattr(stored.get(rng_name), "size", None) == rng.size():
            tensors[rng_name] = rng
        dcp.load(tensors, storage_reader=reader, planner=LoadPlanner())
    except (CheckpointException, OSError, EOFError) as error:
        raise CheckpointError(
            f"loading {step_dir} failed: {_causes(error)}; use another checkpoint"
        ) from error
    zero.set_adam_step(state["adam_step"])
    zero.refresh_parameters()
    if rng_name in tensors:
        _set_rng_state(tensors[rng_name])
    return state


def _owned_tensors(zero: ZeroOptimizer, *, for_saving: bool) -> dict[str, GlobalTensor]:
    """This rank's parts of every global tensor; with for_saving, of what this rank is to write.

    Names with no part here are present too when loading, so that names can be compared.
    """
    first_tensor_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    if for_saving and zero.zero_stage == 0 and replicas_group().rank() > 0:
        return {}  # every rank of the group holds everything
    parts: dict[str, list[Part]] = defaultdict(list)
    for fragment in zero.fragments():
        info = fragment.info
        if for_saving and (info.duplicate or not (info.tensor_parallel or first_tensor_rank)):
            continue
        for kind in KINDS:
            flat = getattr(fragment, kind)
            parts[f"{kind}.{info.name}"] += global_parts(info, fragment.start, flat)
    shapes = {f"{k}.{i.name}": i.global_shape for i in zero.infos.values() for k in KINDS}
    return {
        name: GlobalTensor(shape, parts[name])
        for name, shape in shapes.items()
        if parts[name] or not for_saving
    }


def _check_names(step_dir: Path, wanted: set[str], stored: set[str]) -> None:
    gathered: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, wanted)
    everywhere = set().union(*gathered)
    missing, unknown = sorted(everywhere - stored), sorted(stored - everywhere)
    if missing or unknown:
        raise CheckpointError(
            f"{step_dir} is of another model: "
            f"{len(missing)} tensors missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}; "
            "use the [model] section it was trained with (config.toml of its run)"
        )


def _rng_state() -> torch.Tensor:
    if torch.cuda.is_available():
        return torch.cat((torch.get_rng_state(), torch.cuda.get_rng_state()))
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor) -> None:
    cpu_size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:cpu_size])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state[cpu_size:])


def _on_rank_0(action: Callable[[], None], what: str, folder: Path) -> None:
    """Run `action` on rank 0; its OSError becomes a CheckpointError on every rank."""

    def explained() -> None:
        try:
            action()
        except OSError as error:
            message = f"{what}: {error}{_free_space(folder)}"
            with contextlib.suppress(OSError):
                folders.remove_temporary(folder)
            raise CheckpointError(message) from error

    from_rank_0(explained)


def _check_all_files_here(step_dir: Path) -> None:
    """Every rank's file must be where rank 0 commits: the folder must be shared by all nodes."""
    stored = FileSystemReader(step_dir).read_metadata().storage_data.values()
    missing = sorted({s.relative_path for s in stored if not (step_dir / s.relative_path).exists()})
    if missing:
        raise CheckpointError(
            f"{step_dir} lacks {len(missing)} files that other ranks wrote ({missing[0]}, ...): "
            "checkpoint.dir (or logging.run_dir) must lie on a file system that all nodes share"
        )


def _free_space(folder: Path) -> str:
    """How full the disk is, for messages: DCP does not say that it was the reason."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    full = "No space left on device: " if free < 2**20 else ""
    return f" ({full}{free / 2**20:,.1f} MiB free on the file system of {existing})"


def _causes(error: BaseException) -> str:
    """One line: the distinct causes DCP collected from the ranks."""
    if isinstance(error, CheckpointException):
        by_rank = {rank: str(failure[0]) for rank, failure in error.failures.items()}
        first = min(by_rank)
        return f"rank {first}: {by_rank[first]} ({len(by_rank)} rank(s) failed)"
    return str(error)
