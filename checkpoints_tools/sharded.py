"""The sharded training state as global tensors: what a rank saves, and loading it again.

Float32 weights and Adam moments under the names of the single-GPU model, and the state of random
numbers. Every rank saves the fragments it owns (ZeRO); what several ranks hold alike is shared out
among them, so that all write about as much. Model weights in bf16 are the rounded float32 ones, so
they are not stored twice.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.global_tensors import GlobalTensor, Part, global_parts
from checkpoints_tools.manifest import read_manifest
from checkpoints_tools.stored import KINDS, StoredTensors
from parallel.groups import replicas_group
from parallel.params import ParamInfo
from parallel.zero import Fragment, ZeroOptimizer
from untrusted.numbers import counted

T = TypeVar("T")


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

    Raises CheckpointError, on every rank, when it is damaged or of another model. Collective.
    """
    manifest = on_every_rank(lambda: read_manifest(step_dir))
    stored = on_every_rank(lambda: StoredTensors(step_dir, manifest["files"]))
    tensors = _tensors_to_load(zero, KINDS)
    check_names(step_dir, set(tensors), {n for n in stored.tensors if not n.startswith("rng.")})
    on_every_rank(lambda: _fill(stored, tensors))
    zero.set_adam_step(manifest["adam_step"])
    zero.refresh_parameters()
    on_every_rank(lambda: _restore_rng_state(stored))
    return manifest


def _fill(stored: StoredTensors, wanted: dict[str, GlobalTensor]) -> None:
    """Read this rank's parts. Raises CheckpointError."""
    for name, tensor in wanted.items():
        found = stored.tensors[name]
        if (found.shape, found.dtype) != (tuple(tensor.shape), torch.float32):
            raise CheckpointError(
                f"{stored.step_dir}: {name} is {found.dtype} {list(found.shape)}, but the [model] "
                f"section gives it torch.float32 {list(tensor.shape)}; use the section it was "
                "trained with (config.toml of its run)"
            )
        for part in tensor.parts:
            stored.fill(name, part.offsets, part.data)
    stored.close()


def on_every_rank(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any, raise its CheckpointError on all.

    Collective.
    """
    cause, result = None, None
    try:
        result = action()
    except CheckpointError as error:
        cause = str(error)
    causes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(causes, cause)
    failed = [(rank, cause) for rank, cause in enumerate(causes) if cause is not None]
    if failed:
        how_many = counted(len(failed), "rank")
        raise CheckpointError(f"rank {failed[0][0]}: {failed[0][1]} ({how_many} failed)")
    return result  # type: ignore[return-value]


def weights_to_load(weights: Weights) -> dict[str, GlobalTensor]:
    """This rank's parts of every weight, under the single-GPU model's names."""
    (kind,) = KINDS[:1]
    found = _tensors_to_load(weights, (kind,))
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in found.items()}


def load_stored_weights(step_dir: Path, weights: Weights) -> None:
    """Fill the weights alone, and nothing else, from a checkpoint.

    Raises CheckpointError on every rank. Collective.
    """
    stored = on_every_rank(lambda: StoredTensors(step_dir, read_manifest(step_dir)["files"]))
    tensors = _tensors_to_load(weights, KINDS[:1])
    there = {name for name in stored.tensors if name.startswith(f"{KINDS[0]}.")}
    check_names(step_dir, set(tensors), there)
    on_every_rank(lambda: _fill(stored, tensors))
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


def _restore_rng_state(stored: StoredTensors) -> None:
    """Restore the state of this rank's stream, where one of this kind of device is stored."""
    name, state = _rng_name(), _rng_state()
    found = stored.tensors.get(name)
    if found is None or (found.shape, found.dtype) != (tuple(state.shape), state.dtype):
        return
    stored.fill(name, (0,), state)
    stored.close()
    cpu_size = torch.get_rng_state().numel()
    try:
        torch.set_rng_state(state[:cpu_size])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state[cpu_size:])
    except RuntimeError as error:
        raise CheckpointError(
            f"{stored.step_dir}: {name} is no state of random numbers ({error}); use another "
            "checkpoint"
        ) from error
