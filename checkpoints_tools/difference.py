"""How two checkpoints differ: configuration, data, counters, tensors; streaming, one process."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools import folder as folders
from checkpoints_tools.averaging import differing_fields
from checkpoints_tools.manifest import read_manifest
from checkpoints_tools.stored import StoredTensors

# what only the trainer reads: recent losses and norms, a step's metrics
INTERNAL = {"judge", "unwritten_metrics"}
NOT_COMPARED = {"files", "config", "format_version"} | INTERNAL


def diff_checkpoints(a: Path, b: Path, *, values: bool = True) -> dict[str, Any]:
    """{"a", "b": folders; "fields": {name: [of a, of b]}; "tensors": entries, worst first}.

    A tensor's entry has its name and either `problem` (missing, another shape, NaN or infinity
    where the other has something else; these come first) or `relative` |a - b| / max(|a|, |b|),
    `largest` |a_i - b_i| and `elements` that differ; all finite. Tensors whose values are the same,
    NaN and infinity among them, are left out. Without `values` only shapes are compared. Raises
    CheckpointError.
    """
    dirs = [folders.resolve(path) for path in (a, b)]
    manifests = [read_manifest(step_dir) for step_dir in dirs]
    stored = [StoredTensors(d, m["files"]) for d, m in zip(dirs, manifests, strict=True)]
    flat = [_flattened(manifest) for manifest in manifests]
    tensors = _header_differences(*stored)
    # the same files hold the same tensors
    if values and manifests[0]["files"] != manifests[1]["files"]:
        different = _value_differences(*stored)
        tensors += sorted(different, key=lambda entry: -entry.get("relative", math.inf))
    return {
        "a": str(dirs[0]),
        "b": str(dirs[1]),
        "fields": {name: list(pair) for name, pair in differing_fields(*flat).items()},
        "tensors": tensors,
        "tensors_compared": len(stored[0].tensors.keys() & stored[1].tensors.keys()),
    }


def _flattened(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return counters and data by name; configuration, layout and versions by dotted names."""
    fields: dict[str, Any] = {}
    for name, value in manifest.items():
        if name not in NOT_COMPARED:
            inner = value if name in ("layout", "versions") and isinstance(value, dict) else None
            fields |= {name: value} if inner is None else _named(name, inner)
    for section, values in manifest["config"].items():
        inner = values if isinstance(values, dict) else None
        fields |= (
            {f"config.{section}": values} if inner is None else _named(f"config.{section}", inner)
        )
    return fields


def _named(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _header_differences(a: StoredTensors, b: StoredTensors) -> list[dict[str, Any]]:
    found = []
    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        if name not in b.tensors or name not in a.tensors:
            found.append({"name": name, "problem": f"only in {'a' if name in a.tensors else 'b'}"})
        elif not _comparable(a, b, name):
            kinds = [f"{s.tensors[name].dtype} {list(s.tensors[name].shape)}" for s in (a, b)]
            found.append({"name": name, "problem": " and ".join(kinds).replace("torch.", "")})
    return found


def _comparable(a: StoredTensors, b: StoredTensors, name: str) -> bool:
    one, other = a.tensors[name], b.tensors.get(name)
    return other is not None and (one.shape, one.dtype) == (other.shape, other.dtype)


def _value_differences(a: StoredTensors, b: StoredTensors) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in a.tensors:
        if not _comparable(a, b, name):
            continue
        sums = torch.zeros(3, dtype=torch.float64)  # of (a - b)², a², b²
        largest, elements = 0.0, 0
        unusable: set[str] = set()
        for rows, block in a.blocks(name):
            other = b.rows(name, rows)
            if _same_bytes(block, other):
                sums[1:] += _finite(block).square().sum()
                continue
            different = (block != other) & ~(block.isnan() & other.isnan())
            for which, values in (("a", block[different]), ("b", other[different])):
                unusable |= {f"NaN in {which}"} if values.isnan().any() else set()
                unusable |= {f"infinity in {which}"} if values.isinf().any() else set()
            block, other = _finite(block), _finite(other)
            gap = block - other
            sums += torch.stack([t.square().sum() for t in (gap, block, other)])
            largest = max(largest, float(gap.abs().max()))
            elements += int(different.sum())
        norm = math.sqrt(float(sums[1:].max()))
        relative = math.sqrt(float(sums[0])) / norm if norm else 0.0
        if unusable or not math.isfinite(relative):
            problem = ", ".join(sorted(unusable)) or "values too large to compare"
            found.append({"name": name, "problem": problem})
        elif elements:
            found.append(
                {"name": name, "relative": relative, "largest": largest, "elements": elements}
            )
    return found


def _finite(block: Tensor) -> Tensor:
    """In float64, with 0 for NaN and infinity."""
    return block.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
