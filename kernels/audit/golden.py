"""The sheet as it was when last accepted, kept beside the code so that a change shows."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from kernels.audit.sheet import Row, Sheet

PATH = Path(__file__).with_name("golden.json")
Entries = dict[str, dict[str, Any]]  # "case | direction | kernel | target" -> numbers


def versions() -> dict[str, str]:
    """Of the compilers, which the numbers depend on."""
    tools = triton.knobs.nvidia
    return {
        "triton": triton.__version__,
        "ptxas": _release(tools.ptxas.path),
        "ptxas-blackwell": _release(tools.ptxas_blackwell.path),
    }


def _release(path: str) -> str:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("release ")[1].split(",")[0]


def entries(sheet: Sheet) -> Entries:
    found = {f"{r.case} | {r.direction} | {r.kernel} | {r.target}": _numbers(r) for r in sheet.rows}
    for (case, direction, target), work in sheet.work.items():
        found[f"{case} | {direction} | traffic | {target}"] = {
            "loaded": work.traffic.loaded,
            "stored": work.traffic.stored,
            "minimum": work.minimum,
            "flops": work.flops,
        }
    return found


def _numbers(row: Row) -> dict[str, Any]:
    """What a recompilation by the same versions repeats; widths as text for JSON."""
    found = row.found
    products: dict[str, int] = {}
    for product in found.products:
        kind = f"{product.unit} {product.dtype} {product.shape}"
        products[kind] = products.get(kind, 0) + 1
    return {
        "programs": row.programs,
        "launches": row.launches,
        "warps": found.num_warps,
        "stages": found.num_stages,
        "registers": found.registers,
        "spill_stores": found.spill_stores,
        "spill_loads": found.spill_loads,
        "local_instructions": found.local_instructions,
        "shared": found.shared,
        "programs_per_sm": found.programs_per_sm,
        "products": products,
        "tensor_instructions": found.tensor_instructions,
        "loads": _text(found.loads),
        "stores": _text(found.stores),
        "async_copies": _text(found.async_copies),
        "bulk_copies": found.bulk_copies,
        "atomics": found.atomics,
        "code_bytes": found.code_bytes,
    }


def _text(widths: dict[int, int]) -> dict[str, int]:
    return {str(bits): times for bits, times in widths.items()}


def write(found: Entries, targets: Sequence[str], path: Path) -> None:
    """Replace the golden entries of the audited targets; one line an entry."""
    kept = {key: numbers for key, numbers in read(path).items() if _target(key) not in targets}
    lines = [f"    {json.dumps(k)}: {json.dumps(n)}" for k, n in sorted((kept | found).items())]
    head = f'{{\n  "versions": {json.dumps(versions())},\n  "entries": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n  }\n}\n")


def changes(found: Entries, targets: Sequence[str], path: Path) -> list[str]:
    """How `found` differs from the golden entries of the audited targets, in sentences."""
    said = []
    if (by := recorded_versions(path)) != versions():
        said.append(f"golden numbers were made by {by}, these by {versions()}")
    recorded = {key: numbers for key, numbers in read(path).items() if _target(key) in targets}
    for state, keys in (("new", found.keys() - recorded), ("gone", recorded.keys() - found)):
        said += [f"{key}: {state}" for key in sorted(keys)]
    for key in sorted(found.keys() & recorded):
        before, now = recorded[key], found[key]
        fields = [field for field in now if before.get(field) != now[field]]
        if fields:
            different = [f"{field} {before.get(field)} → {now[field]}" for field in fields]
            said.append(f"{key}: {', '.join(different)}")
    return said


def read(path: Path) -> Entries:
    """The golden entries; none where there is no file yet."""
    found: Entries = _document(path)["entries"]
    return found


def recorded_versions(path: Path) -> dict[str, str]:
    """Of the compilers that the golden entries were made by."""
    found: dict[str, str] = _document(path)["versions"]
    return found


def _document(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"versions": {}, "entries": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _target(key: str) -> str:
    return key.rsplit(" | ", 1)[1]
