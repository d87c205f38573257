"""Matrix products and recurrent loops of a kernel, read from Triton's intermediate code.

A product is a `tt.dot` of the code as written (TTIR). What became of it stands in the code after
Triton's GPU passes (TTGIR), at the same source location: wgmma, mma.sync, tcgen05 or mfma run on
tensor cores, fma does not. Matching by location matters: where a product falls off the tensor cores
its bf16 operands are converted first, so that the lowered code shows an ordinary float32 product.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

_PRODUCT = re.compile(r"= (tt\.dot(?:_scaled)?|ttng\.warp_group_dot) |(ttng\.tc_gen5_mma\w*) ")
_OPERANDS = re.compile(r" : \w*\W*?tensor<(\w+?)x([a-z]\w*)[,>].*?\* tensor<(\w+?)x([a-z]\w*)[,>]")
_RESULT_LAYOUT = re.compile(r"-> tensor<[^,>]*, (#\w+)")
_ALIAS = re.compile(r"^(#\w+) = (.*)$", re.MULTILINE)
_LOCATION = re.compile(r"loc\((#\w+)\)\s*$")
_FOR = re.compile(r"^( *).*scf\.for .*iter_args\((.*?)\) -> \((.*?)\) ")
_CARRIED_MATRIX = re.compile(r"tensor<\d+x\d+x(?:f|bf)\d+")


@dataclass(frozen=True)
class Product:
    shape: str  # "64x32x128": M, N, K
    dtype: str  # of the operands as written: "bf16", "f32", ...
    unit: str  # "wgmma", "mma.sync", "tcgen05", "mfma", "fma", or "untraced"
    line: str  # "fused.py:57"


def products(ttir: str, ttgir: str) -> list[Product]:
    """The products of a kernel in the order written."""
    units = _units(ttgir)
    names = dict(_ALIAS.findall(ttir))
    found = []
    for line in ttir.splitlines():
        if not (operands := _OPERANDS.search(line)) or not _PRODUCT.search(line):
            continue
        left, dtype, right, _ = operands.groups()
        place = _location(line, names)
        unit = "+".join(sorted(units.get(place, {"untraced"})))
        shape = "x".join((*left.split("x")[:-1], right.split("x")[-1], left.split("x")[-1]))
        found.append(Product(shape, dtype, unit, _source_line(place)))
    return found


def recurrent_stages(ttir: str, num_stages: int) -> int:
    """Pipeline stages of the loops that carry a matrix from product to product; 0: no such loop.

    Carrying an accumulator alone, as a matrix product over blocks of K does, is not recurrent.
    """
    lines = ttir.splitlines()
    stages = 0
    for start, line in enumerate(lines):
        if not (loop := _FOR.match(line)):
            continue
        indent, carried, types = loop.groups()
        names = [pair.split(" = ")[0] for pair in carried.split(", ")]
        matrices = [
            name
            for name, kind in zip(names, types.split(", "), strict=True)
            if _CARRIED_MATRIX.match(kind)
        ]
        body = list(_body(lines, start, indent))
        multiplies = any("tt.dot" in inner for inner in body)
        if multiplies and any(_used_beyond_accumulation(name, body) for name in matrices):
            closing = lines[start + len(body) + 1]
            own = re.search(r"tt\.num_stages = (\d+)", closing)
            stages = max(stages, int(own.group(1)) if own else num_stages)
    return stages


def _units(ttgir: str) -> dict[str, set[str]]:
    """By source location, the units that the products there run on."""
    names = dict(_ALIAS.findall(ttgir))
    units: dict[str, set[str]] = {}
    for line in ttgir.splitlines():
        if operation := _PRODUCT.search(line):
            unit = _unit(operation.group(1) or operation.group(2), line, names)
            units.setdefault(_location(line, names), set()).add(unit)
    return units


def _unit(operation: str, line: str, names: dict[str, str]) -> str:
    if operation == "ttng.warp_group_dot":
        return "wgmma"
    if operation.startswith("ttng.tc_gen5_mma"):
        return "tcgen05"
    layout = _RESULT_LAYOUT.search(line)
    definition = names.get(layout.group(1), "") if layout else ""
    if definition.startswith("#ttg.nvidia_mma"):
        return "mma.sync"
    return "mfma" if definition.startswith("#ttg.amd_mfma") else "fma"


def _location(line: str, names: dict[str, str]) -> str:
    """The location at a line's end, its aliases spelt out."""
    found = _LOCATION.search(line)
    text = names.get(found.group(1), "") if found else ""
    while aliases := set(re.findall(r"#loc\d*\b", text)) & names.keys():
        for alias in aliases:
            text = re.sub(rf"{alias}\b", names[alias].replace("\\", r"\\"), text)
    return text


def _source_line(location: str) -> str:
    found = re.search(r'"([^"]+)":(\d+):', location)
    return f"{PurePath(found.group(1)).name}:{found.group(2)}" if found else "?"


def _body(lines: list[str], start: int, indent: str) -> Iterator[str]:
    for line in lines[start + 1 :]:
        if line.startswith(f"{indent}}}"):
            return
        yield line


def _used_beyond_accumulation(name: str, body: list[str]) -> bool:
    """Whether a carried matrix is more than a product's accumulator; yielding it is no use."""
    used = re.compile(rf"{re.escape(name)}\b")
    accumulated = re.compile(rf"tt\.dot %\S+, %\S+, {re.escape(name)}\b")
    return any(
        used.search(line) and "scf.yield" not in line and not accumulated.search(line)
        for line in body
    )
