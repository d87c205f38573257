"""The sheet as tables."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.table import Column, Table

from kernels.audit.compiling import TARGETS
from kernels.audit.resources import Resources
from kernels.audit.roofline import PEAKS, Work, bound_seconds
from kernels.audit.sheet import Count, Row, Sheet

MIB = 2**20


def resource_table(rows: Sequence[Row], target: str) -> Table:
    """What the compiler made of each kernel; counts are of instructions in the code."""
    names = (
        "case; pass, kernel", "programs", "warps/stages", "registers", "spill B", "local",
        "shared B", "programs/SM", "warps/SM", "products", "loads", "stores", "async copies", "TMA",
        "atomics", "code KiB", "compile s",
    )  # fmt: skip
    left = ("case; pass, kernel", "products")
    columns = [Column(n, justify="left" if n in left else "right") for n in names]
    table = Table(
        *columns,
        title=f"{target}: {PEAKS[target].name}, {TARGETS[target].num_sms} multiprocessors",
        title_justify="left",
    )
    of_target = [row for row in rows if row.target == target]
    for case, kernels in groupby(of_target, key=lambda row: row.case):
        table.add_section()
        table.add_row(case)
        for row in kernels:
            table.add_row(f"  {row.direction}, {row.kernel}", *_cells(row))
    return table


def _cells(row: Row) -> Iterator[str]:
    found = row.found
    yield f"{row.programs:,}" + (f" ×{row.launches}" if row.launches > 1 else "")
    yield f"{found.num_warps}/{found.num_stages}"
    yield str(found.registers)
    yield f"{found.spill_stores:,}/{found.spill_loads:,}"
    yield str(found.local_instructions)
    yield f"{found.shared:,}"
    yield f"{found.programs_per_sm} ({found.limiter})"
    yield str(found.warps_per_sm)
    yield _products(found)
    yield _widths(found.loads)
    yield _widths(found.stores)
    yield _widths(found.async_copies)
    yield str(found.bulk_copies)
    yield str(found.atomics)
    yield f"{found.code_bytes / 1024:.1f}"
    yield f"{found.compile_seconds:.1f}"


def _products(found: Resources) -> str:
    """ "4 wgmma bf16 (16)": products, their unit and operands; tensor instructions in all."""
    kinds = Counter(f"{product.unit} {product.dtype}" for product in found.products)
    text = ", ".join(f"{times} {kind}" for kind, times in kinds.items())
    return f"{text} ({found.tensor_instructions})" if kinds else "-"


def _widths(widths: dict[int, int]) -> str:
    """ "128:24 32:1": bits a thread, instructions."""
    return " ".join(f"{bits}:{times}" for bits, times in widths.items()) or "-"


def traffic_table(sheet: Sheet, target: str) -> Table:
    """Bytes moved against the least possible, and the time that neither can be faster than."""
    peak = PEAKS[target]
    table = Table(
        "case, pass",
        *(
            Column(name, justify="right")
            for name in (
                "moved MiB", "minimum MiB", "ratio", "allowed", "counted", "GFLOP",
                "bound µs", "bound of the minimum µs",
            )
        ),
        title=(
            f"{target}: traffic by formula; roofline bounds, not measurements, at"
            f" {peak.bytes_per_second / 1e12:g} TB/s and {peak.half_flops_per_second / 1e12:g}"
            f" TFLOP/s ({peak.name})"
        ),
        title_justify="left",
    )  # fmt: skip
    counts = {(found.case, found.direction): found for found in sheet.counts}
    for (case, direction, of), work in sheet.work.items():
        if of == target:
            agreed = _agreement(counts.get((case, direction)))
            table.add_row(f"{case}, {direction}", *_bounds(work, agreed, target))
    return table


def _bounds(work: Work, agreed: str, target: str) -> Iterator[str]:
    moved = work.traffic.total
    yield f"{moved / MIB:,.1f}"
    yield f"{work.minimum / MIB:,.1f}"
    yield f"{moved / work.minimum:.2f}"
    yield f"{work.allowed:g}" if work.allowed < float("inf") else "-"
    yield agreed
    yield f"{work.flops / 1e9:,.1f}"
    yield f"{bound_seconds(moved, work.flops, PEAKS[target]) * 1e6:,.1f}"
    yield f"{bound_seconds(work.minimum, work.flops, PEAKS[target]) * 1e6:,.1f}"


def _agreement(found: Count | None) -> str:
    """How counting a small problem in the interpreter and the formula compare."""
    if found is None:
        return "-"
    return "agrees" if found.counted == found.formula else "DISAGREES"
