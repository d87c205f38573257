"""From a sharded checkpoint to a single-GPU folder: safetensors, config.json, tokenizer, card.

One process, no GPU, neither DeepSpeed nor Megatron-core. Tensors pass through a block of rows at a
time, so memory does not grow with the model. A failure leaves nothing at OUT.
"""

import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.hugging_face import write_hugging_face_files
from checkpoints_tools.model_card import model_card
from checkpoints_tools.new_folder import new_folder, refuse_existing
from checkpoints_tools.safetensors_files import Planned, plan_files, write_files
from checkpoints_tools.single_gpu import FLOAT32_PARAMETERS, ModelError
from checkpoints_tools.source import EXPORT_DTYPES, Source, open_source, single_gpu_config

MAX_SHARD_BYTES = 5 * 10**9


def export_checkpoint(
    step_dir: Path,
    out: Path,
    dtype: str = "fp32",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    checksums: bool = True,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Write the float32 weights of a checkpoint as a single-GPU model; returns the parameter count.

    max_shard_bytes: of a safetensors file; a larger tensor gets a file of its own. checksums: read
    every file of the checkpoint first and compare it with the manifest. check: called with the
    finished folder before it is given its name; what it raises keeps that from happening.

    Raises CheckpointError when the checkpoint is unsound, when its tensors are not exactly those of
    the model it says it is, when a value does not fit `dtype`, when `out` exists or cannot be
    written.
    """
    refuse_existing(out)
    source = open_source(step_dir, checksums=checksums)
    config = single_gpu_config(source.manifest, dtype)
    files = plan_files(planned_tensors(source.shapes, EXPORT_DTYPES[dtype]), max_shard_bytes)
    num_parameters = sum(prod(shape) for shape in source.shapes.values())
    num_bytes = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
    try:
        with new_folder(out, num_bytes) as content:
            converted = Conversion(source)
            write_files(content, files, converted.blocks)
            converted.refuse_problems(dtype)
            write_hugging_face_files(content, config, source.step_dir / "tokenizer.json")
            card = model_card(source, config, num_parameters, sorted(files))
            (content / "README.md").write_text(card, encoding="utf-8")
            if check is not None:
                check(content)
            _sync(content)
    except ModelError as error:
        raise CheckpointError(f"{source.step_dir}: {error}") from error
    return num_parameters


def planned_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[Planned]:
    """What an export holds: `dtype`, but float32 for what the model keeps in float32."""
    return [Planned(name, shape, stored_dtype(name, dtype)) for name, shape in shapes.items()]


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a parameter in an export of `dtype`."""
    return torch.float32 if name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS else dtype


class Conversion:
    """Weights of a checkpoint in the dtypes of an export, and what went wrong with them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.read: set[str] = set()
        self.overflowing: dict[str, float] = {}
        self.not_finite: list[str] = []

    def blocks(self, tensor: Planned) -> Iterator[Tensor]:
        """The rows of a weight, once; raises CheckpointError when it was asked for before."""
        if tensor.name in self.read:
            raise CheckpointError(f"{tensor.name} would be written twice")
        self.read.add(tensor.name)
        for _, block in self.source.stored.blocks(f"weight.{tensor.name}"):
            converted = block.to(tensor.dtype)
            if not converted.isfinite().all():
                self._note(tensor.name, block)
            yield converted

    def _note(self, name: str, block: Tensor) -> None:
        if not block.isfinite().all():
            if name not in self.not_finite:
                self.not_finite.append(name)
            return
        largest = float(block.abs().max())
        self.overflowing[name] = max(largest, self.overflowing.get(name, 0.0))

    def refuse_problems(self, dtype: str) -> None:
        """Raise CheckpointError when a weight was not read, is not finite, or does not fit."""
        if left := [name for name in self.source.shapes if name not in self.read]:
            raise CheckpointError(f"{_some(left)} would not be written")
        if self.not_finite:
            raise CheckpointError(
                f"{self.source.step_dir}: NaN or infinity in {_some(self.not_finite)}; use an "
                "earlier checkpoint"
            )
        if self.overflowing:
            limit = torch.finfo(EXPORT_DTYPES[dtype]).max
            names = [f"{name} (up to {value:.4g})" for name, value in self.overflowing.items()]
            raise CheckpointError(
                f"{self.source.step_dir}: {dtype} ends at {limit:.4g}, and these do not fit: "
                f"{_some(names)}; export with --dtype bf16 or fp32"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _sync(folder: Path) -> None:
    """All files of a folder, and the folder, on disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folders.sync_folder(folder)
