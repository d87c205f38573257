"""The golden numbers as a page of the documentation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels.audit.compiling import TARGETS
from kernels.audit.golden import Entries
from kernels.audit.roofline import PEAKS, bound_seconds

PATH = Path(__file__).parents[2] / "docs" / "kernels_audit.md"
MIB = 2**20

HEAD = """\
# What the compiler makes of the kernels

Written by `transxssm kernels audit --update` on a host without a GPU; what the columns mean stands
in [kernels.md](kernels.md). Nothing here is a measurement.

Compilers: {versions}.
"""
KERNELS = (
    "case", "pass", "kernel", "programs", "warps", "registers", "spill B", "shared B", "warps/SM",
    "products", "loads", "stores", "async", "atomics", "code KiB",
)  # fmt: skip
TRAFFIC = ("case", "pass", "moved MiB", "minimum MiB", "ratio", "GFLOP", "roofline bound µs")


def document(entries: Entries, versions: dict[str, str]) -> str:
    """Markdown: for each target a table of kernels and one of traffic."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [HEAD.format(versions=named)]
    for target, gpu in TARGETS.items():
        of_target = [(k.split(" | "), v) for k, v in entries.items() if k.endswith(f" | {target}")]
        kernels = [_kernel(key, v) for key, v in of_target if key[2] != "traffic"]
        traffic = [_traffic(key, v) for key, v in of_target if key[2] == "traffic"]
        if kernels:
            lines.append(f"## {target}: {PEAKS[target].name}, {gpu.num_sms} multiprocessors\n")
            lines += [*_table(KERNELS, kernels), "", *_table(TRAFFIC, traffic), ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _kernel(key: list[str], v: dict[str, Any]) -> list[str]:
    units = [kind.rsplit(" ", 1)[0] for kind, times in v["products"].items() for _ in range(times)]
    products = ", ".join(f"{units.count(unit)} {unit}" for unit in dict.fromkeys(units))
    return [
        *key[:3],
        f"{v['programs']:,}",
        str(v["warps"]),
        str(v["registers"]),
        f"{v['spill_stores']:,}/{v['spill_loads']:,}",
        f"{v['shared']:,}",
        str(v["programs_per_sm"] * v["warps"]),
        products or "-",
        *(_widths(v[field]) for field in ("loads", "stores", "async_copies")),
        str(v["atomics"]),
        f"{v['code_bytes'] / 1024:.1f}",
    ]


def _widths(widths: dict[str, int]) -> str:
    return " ".join(f"{bits}:{times}" for bits, times in widths.items()) or "-"


def _traffic(key: list[str], v: dict[str, Any]) -> list[str]:
    moved = v["loaded"] + v["stored"]
    bound = bound_seconds(moved, v["flops"], PEAKS[key[3]])
    return [
        *key[:2],
        f"{moved / MIB:,.1f}",
        f"{v['minimum'] / MIB:,.1f}",
        f"{moved / v['minimum']:.2f}",
        f"{v['flops'] / 1e9:,.1f}",
        f"{bound * 1e6:,.1f}",
    ]
