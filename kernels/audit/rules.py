"""What is wrong with a compiled kernel, and which faults are accepted for a stated reason."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kernels.audit.resources import SHARED_LIMIT, Resources
from kernels.audit.roofline import Work
from kernels.target import Target

SPILL_ALLOWED = 64  # bytes a thread
# ptxas falls back to so few where its allocation fails, and spills the rest: kilobytes a thread,
# kernels tens of times slower (github.com/state-spaces/mamba/issues/904).
CAPPED_REGISTERS = 32
# Of mamba_ssm's best large-tile configurations of the same stages on sm_90.
MIN_WARPS_PER_SM = 8
TENSOR_UNITS = ("wgmma", "mma.sync", "tcgen05", "mfma")

RULES = (
    "compiles",
    "spill",
    "capped registers",
    "tensor cores",
    "shared memory",
    "occupancy",
    "stages",
    "atomics",
    "traffic",
)


@dataclass(frozen=True)
class Violation:
    case: str
    kernel: str
    target: str
    rule: str  # one of RULES
    sentence: str


@dataclass(frozen=True)
class Allowance:
    """Accepts the violations of a rule. case, kernel and target are patterns such as "ssd*"."""

    case: str
    kernel: str
    target: str
    rule: str
    reason: str

    def covers(self, case: str, kernel: str, target: str) -> bool:
        return (
            fnmatchcase(case, self.case)
            and fnmatchcase(kernel, self.kernel)
            and fnmatchcase(target, self.target)
        )


def faults(target: Target, found: Resources) -> Iterator[tuple[str, str]]:
    """The broken rules of a kernel: rule, and what was found beside the limit."""
    stores, loads = found.spill_stores, found.spill_loads
    if max(stores, loads) > SPILL_ALLOWED:
        said = f"spills {stores:,} bytes a thread and loads {loads:,}; {SPILL_ALLOWED} are allowed"
        yield "spill", said
    if found.registers <= CAPPED_REGISTERS and stores:
        said = f"has {found.registers} registers a thread and spills {stores:,} bytes"
        yield "capped registers", f"{said}: allocation failed; set maxnreg or use more warps"
    for product in dict.fromkeys(found.products):
        half = found.half or product.dtype in ("bf16", "f16")
        if half and product.unit not in TENSOR_UNITS:
            said = f"product {product.shape} of {product.dtype} at {product.line}"
            yield "tensor cores", f"{said} runs on {product.unit}"
    limit = SHARED_LIMIT[target.arch]
    if found.shared > limit:
        said = f"wants {found.shared:,} bytes of shared memory; a program has {limit:,}"
        yield "shared memory", said
    elif found.warps_per_sm < MIN_WARPS_PER_SM:
        said = f"keeps {found.warps_per_sm} warps on a multiprocessor, limited by {found.limiter}"
        yield "occupancy", f"{said}; {MIN_WARPS_PER_SM} are wanted"
    blackwell = isinstance(target.arch, int) and target.arch // 10 == 10
    if blackwell and found.recurrent_stages > 1:
        said = f"carries a matrix between products in a loop of {found.recurrent_stages} stages"
        yield "stages", f"{said}, which Triton miscompiles there (PR 10993); set num_stages=1"
    if found.atomics:
        yield "atomics", f"has {found.atomics} atomic operations on global memory: no fixed order"


def traffic_faults(work: Work) -> Iterator[tuple[str, str]]:
    """Whether a pass moves more than is allowed of it."""
    ratio = work.traffic.total / work.minimum
    if ratio > work.allowed:
        yield "traffic", f"moves {ratio:.2f} times the minimum; {work.allowed:g} are allowed"


@dataclass(frozen=True)
class Verdict:
    refused: list[Violation]
    accepted: list[tuple[Violation, Allowance]]
    stale: list[Allowance]  # accept nothing that was found


def judge(
    violations: Iterable[Violation],
    audited: Iterable[tuple[str, str, str]],
    allowances: Iterable[Allowance],
) -> Verdict:
    """Sort violations by whether an allowance accepts them.

    audited: (case, kernel, target) of everything compiled; an allowance is stale only when
    something it speaks of was.
    """
    allowances, audited = list(allowances), list(audited)
    refused: list[Violation] = []
    accepted: list[tuple[Violation, Allowance]] = []
    for violation in violations:
        for allowance in allowances:
            names = (violation.case, violation.kernel, violation.target)
            if allowance.rule == violation.rule and allowance.covers(*names):
                accepted.append((violation, allowance))
                break
        else:
            refused.append(violation)
    used = {allowance for _, allowance in accepted}
    stale = [a for a in allowances if a not in used and any(a.covers(*names) for names in audited)]
    return Verdict(refused, accepted, stale)
