"""`transxssm kernels audit`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from kernels.audit import document, golden
from kernels.audit.allowed import ALLOWED
from kernels.audit.cases import cases
from kernels.audit.compiling import TARGETS, available_targets
from kernels.audit.report import resource_table, traffic_table
from kernels.audit.rules import Verdict, Violation, judge
from kernels.audit.sheet import Sheet, fill
from kernels.errors import KernelsError
from kernels.target import interpreting
from untrusted.numbers import counted

CHANGES_SHOWN = 40
PIPE_WIDTH = 4096  # nothing is abbreviated where no terminal sets a width


def audit(targets: list[str], update: bool, json_file: Path | None) -> int:
    """Print the audit of `targets` (none: all that Triton has a backend for).

    update: accept what was found as the golden numbers, and rewrite the page that shows them.
    json_file: also write the sheet there.

    Returns the exit code, 1 when a violation is not among those accepted. Raises KernelsError for
    an unknown target, and under TRITON_INTERPRET.
    """
    if interpreting():
        raise KernelsError("TRITON_INTERPRET is set: unset it, so that kernels compile")
    available = available_targets()
    for name in targets:
        if name not in available:
            known = "one of" if name not in TARGETS else "this Triton has only"
            raise KernelsError(f"target {name!r}: expected {known} {', '.join(available)}")
    targets = targets or available
    names = [case.name for case in cases()]
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=len(names) * len(targets) + 1)
        sheet = fill(names, targets, lambda: bar.advance(task))
    console = Console(
        highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH
    )
    for target in targets:
        console.print(resource_table(sheet.rows, target))
        console.print(traffic_table(sheet, target))
    audited = {(row.case, row.kernel, row.target) for row in sheet.rows} | sheet.work.keys()
    verdict = judge(sheet.violations, audited, ALLOWED)
    found = golden.entries(sheet)
    changes = golden.changes(found, targets, golden.PATH)
    if update:
        golden.write(found, targets, golden.PATH)
        recorded = golden.read(golden.PATH)
        document.PATH.write_text(document.document(recorded, golden.versions()))
    if json_file is not None:
        json_file.write_text(json.dumps(_plain(sheet, verdict, changes), indent=1))
    for line in _findings(verdict, changes):
        console.print(line)
    compiled = f"{counted(len(sheet.rows), 'kernel')} for {', '.join(targets)}"
    accepted = f"{len(verdict.accepted)} accepted for a stated reason"
    console.print(f"{compiled}: {counted(len(verdict.refused), 'violation')}, {accepted}")
    return 1 if verdict.refused or verdict.stale else 0


def _findings(verdict: Verdict, changes: list[str]) -> list[str]:
    lines = [f"changed: {change}" for change in changes[:CHANGES_SHOWN]]
    if (hidden := len(changes) - CHANGES_SHOWN) > 0:
        lines.append(f"changed: {hidden} more")
    lines += [f"accepted: {_said(violation)} ({a.reason})" for violation, a in verdict.accepted]
    lines += [f"stale: nothing breaks {a.rule!r} in {a.case}, {a.kernel}, {a.target} any more:"
              " drop it from kernels/audit/allowed.py" for a in verdict.stale]  # fmt: skip
    return lines + [f"VIOLATION: {_said(violation)}" for violation in verdict.refused]


def _said(violation: Violation) -> str:
    place = f"{violation.case}, {violation.kernel}, {violation.target}"
    return f"{place}: {violation.rule}: {violation.sentence}"


def _plain(sheet: Sheet, verdict: Verdict, changes: list[str]) -> dict[str, object]:
    work = [
        {"case": case, "direction": direction, "target": target, **asdict(needed)}
        for (case, direction, target), needed in sheet.work.items()
    ]
    return {
        "versions": golden.versions(),
        "kernels": [asdict(row) for row in sheet.rows],
        "work": work,
        "counts": [asdict(count) for count in sheet.counts],
        "violations": [asdict(violation) for violation in verdict.refused],
        "accepted": [asdict(violation) | {"reason": a.reason} for violation, a in verdict.accepted],
        "changes": changes,
    }
