"""The sharded training state as global tensors: what a rank saves, and loading it again.

Float32 weights and Adam moments under the names of the single-GPU model, and the state of random
numbers. Every rank saves the fragments it owns (ZeRO); what several ranks hold alike is shared out
among them, so that all write about as much. Model weights in bf16 are the rounded float32 ones, so
they are not stored twice.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.global_tensors import GlobalTensor, LoadPlanner, Part, global_parts
from checkpoints_tools.manifest import read_manifest
from parallel.groups import replicas_group
from parallel.params import ParamInfo
from parallel.zero import Fragment, ZeroOptimizer

KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Weights(Protocol):
    """What weights are loaded into: a ZeroOptimizer or a FrozenStage."""

    infos: dict[str, ParamInfo]

    def fragments(self) -> Iterator[Fragment]:
        """To be filled."""

    def refresh_parameters(self) -> None:
        """Called when they are."""


def tensors_to_save(zero: ZeroOptimizer) -> dict[str, GlobalTensor | Tensor]:
    """What this rank is to write: its parts of global tensors, views of the live state; and its
    random state, if it is the first that reads its stream of samples."""
    parts: dict[str, list[Part]] = defaultdict(list)
    shapes = {}
    for fragment in zero.fragments():
        info = fragment.info
        if info.duplicate:  # the first stage has it too
            continue
        begin, end = _share(fragment, zero.zero_stage)
        for kind in KINDS:
            name = f"{kind}.{info.name}"
            flat = getattr(fragment, kind)[begin:end]
            parts[name] += global_parts(info, fragment.start + begin, flat)
            shapes[name] = info.global_shape
    found: dict[str, GlobalTensor | Tensor] = {
        name: GlobalTensor(shapes[name], held) for name, held in parts.items() if held
    }
    if _is_first_of_its_samples():
        found[_rng_name()] = _rng_state()
    return found


def _share(fragment: Fragment, zero_stage: int) -> tuple[int, int]:
    """Begin and end of a fragment's elements that this rank writes, of all that hold them."""
    index, count = 0, 1
    if zero_stage == 0:
        index, count = replicas_group().rank(), replicas_group().size()
    if not fragment.info.tensor_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        index = index * size + parallel_state.get_tensor_model_parallel_rank()
        count *= size
    return fragment.numel * index // count, fragment.numel * (index + 1) // count


def load_checkpoint(step_dir: Path, zero: ZeroOptimizer) -> dict[str, Any]:
    """Fill weights, moments, random state from a committed checkpoint of any layout; its manifest.

    Raises CheckpointError when it is damaged or of another model. A collective.
    """
    manifest = read_manifest(step_dir)
    tensors: dict[str, Any] = _tensors_to_load(zero, KINDS)
    rng_name = _rng_name()
    reader = FileSystemReader(step_dir)
    try:
        stored = reader.read_metadata().state_dict_metadata
        check_names(step_dir, set(tensors), {n for n in stored if not n.startswith("rng.")})
        rng = _rng_state()
        if getattr(stored.get(rng_name), "size", None) == rng.size():
            tensors[rng_name] = rng
        dcp.load(tensors, storage_reader=reader, planner=LoadPlanner())
    except (CheckpointException, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"loading {step_dir} failed: {_causes(error)}; use another checkpoint"
        ) from error
    zero.set_adam_step(manifest["adam_step"])
    zero.refresh_parameters()
    if rng_name in tensors:
        _set_rng_state(tensors[rng_name])
    return manifest


def weights_to_load(weights: Weights) -> dict[str, GlobalTensor]:
    """This rank's parts of every weight, under the single-GPU model's names."""
    (kind,) = KINDS[:1]
    found = _tensors_to_load(weights, (kind,))
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in found.items()}


def load_stored_weights(step_dir: Path, weights: Weights) -> None:
    """Fill the weights alone, and nothing else, from a checkpoint. Raises CheckpointError. A
    collective."""
    tensors = _tensors_to_load(weights, KINDS[:1])
    reader = FileSystemReader(step_dir)
    try:
        stored = reader.read_metadata().state_dict_metadata
        check_names(step_dir, set(tensors), {n for n in stored if n.startswith(f"{KINDS[0]}.")})
        dcp.load(dict(tensors), storage_reader=reader, planner=LoadPlanner())
    except (CheckpointException, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"loading {step_dir} failed: {_causes(error)}") from error
    weights.refresh_parameters()


def _tensors_to_load(weights: Weights, kinds: tuple[str, ...]) -> dict[str, GlobalTensor]:
    """All this rank holds. Names with no part here are present too, so that they can be compared"""
    parts: dict[str, list[Part]] = defaultdict(list)
    for fragment in weights.fragments():
        for kind in kinds:
            flat = getattr(fragment, kind)
            name = f"{kind}.{fragment.info.name}"
            parts[name] += global_parts(fragment.info, fragment.start, flat)
    shapes = {f"{k}.{i.name}": i.global_shape for i in weights.infos.values() for k in kinds}
    return {name: GlobalTensor(shape, parts[name]) for name, shape in shapes.items()}


def check_names(source: Path, wanted: set[str], stored: set[str]) -> None:
    """Raise CheckpointError where the ranks want other tensors than are stored. A collective."""
    gathered: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, wanted)
    everywhere = set().union(*gathered)
    missing, unknown = sorted(everywhere - stored), sorted(stored - everywhere)
    if missing or unknown:
        raise CheckpointError(
            f"{source} is of another model: "
            f"{len(missing)} tensors missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}; "
            "use the [model] section it was trained with (config.toml of its run)"
        )


# -- random numbers: one state for each stream of samples ------------------------------------------


def _rng_name() -> str:
    return f"rng.{parallel_state.get_data_parallel_rank()}"


def _is_first_of_its_samples() -> bool:
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    )


def _rng_state() -> Tensor:
    if torch.cuda.is_available():
        return torch.cat((torch.get_rng_state(), torch.cuda.get_rng_state()))
    return torch.get_rng_state()


def _set_rng_state(state: Tensor) -> None:
    cpu_size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:cpu_size])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state[cpu_size:])


def _causes(error: BaseException) -> str:
    """One line: the distinct causes DCP collected from the ranks."""
    if isinstance(error, CheckpointException):
        by_rank = {rank: str(failure[0]) for rank, failure in error.failures.items()}
        first = min(by_rank)
        return f"rank {first}: {by_rank[first]} ({len(by_rank)} rank(s) failed)"
    return str(error)
