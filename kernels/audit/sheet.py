"""Fill the audit's sheet: every case compiled for every target, and its traffic counted."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from kernels.audit.cases import SMALL_TARGET, find
from kernels.audit.compiling import TARGETS, Launch, compile_only
from kernels.audit.resources import Resources, resources
from kernels.audit.roofline import Traffic, Work
from kernels.audit.rules import Violation, faults, traffic_faults


@dataclass(frozen=True)
class Row:
    """One kernel of one pass of a case, compiled for one target."""

    case: str
    direction: str  # "forward" or "backward"
    kernel: str
    target: str
    programs: int  # of one launch
    launches: int
    found: Resources


@dataclass(frozen=True)
class Compiled:
    """One case for one target."""

    rows: list[Row]
    work: dict[str, Work]  # by direction
    violations: list[Violation]


@dataclass(frozen=True)
class Count:
    """Traffic of one pass of a small problem, counted by interpreting it and by formula."""

    case: str
    direction: str
    counted: Traffic
    atomic: int  # bytes
    formula: Traffic


@dataclass(frozen=True)
class Sheet:
    rows: list[Row]
    work: dict[tuple[str, str, str], Work]  # by case, direction, target
    counts: list[Count]
    violations: list[Violation]


def fill(names: Sequence[str], targets: Sequence[str], finished: Callable[[], None]) -> Sheet:
    """Audit the named cases in a process a CPU; `finished` is called once for each job.

    There is a job for each case and target, and one that counts all traffic.
    """
    jobs = [(name, target) for name in names for target in targets]
    workers = min(len(jobs) + 1, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        counting = pool.submit(count, names)
        compiling = [pool.submit(compile_case, *job) for job in jobs]
        waiting: list[Future[Any]] = [counting, *compiling]
        for future in as_completed(waiting):
            future.result()
            finished()
    rows: list[Row] = []
    work: dict[tuple[str, str, str], Work] = {}
    violations: list[Violation] = []
    for (name, target), part in zip(jobs, (future.result() for future in compiling), strict=True):
        rows += part.rows
        violations += part.violations
        work |= {(name, direction, target): needed for direction, needed in part.work.items()}
    counts = counting.result()
    violations += [violation for found in counts for violation in disagreements(found)]
    return Sheet(rows, work, counts, violations)


def compile_case(name: str, target_name: str) -> Compiled:
    """Compile a case's kernels and judge them; what does not compile is a violation too."""
    case, target = find(name), TARGETS[target_name]
    rows: list[Row] = []
    broken: list[tuple[str, str, str]] = []  # kernel or direction, rule, sentence
    with compile_only(target) as launches:
        try:
            for direction in case.stated.run(torch.device("meta")):
                rows += _rows(name, direction, target_name, launches)
                launches.clear()
        except Exception as error:  # whatever the compiler throws
            broken.append((case.name, "compiles", f"{type(error).__name__}: {error}"))
    for row in rows:
        broken += [(row.kernel, *fault) for fault in faults(target, row.found)]
    work = case.stated.work(target)
    for direction, needed in work.items():
        broken += [(direction, *fault) for fault in traffic_faults(needed)]
        if not any(row.direction == direction for row in rows):
            broken.append((direction, "compiles", "launches no Triton kernel"))
    violations = [Violation(name, kernel, target_name, *fault) for kernel, *fault in broken]
    return Compiled(rows, work, violations)


def _rows(case: str, direction: str, target: str, launches: list[Launch]) -> Iterator[Row]:
    """A kernel compiled in several ways has a row for each, told apart as #2, #3, ..."""
    by_hash: dict[str, list[Launch]] = {}
    for launch in launches:
        by_hash.setdefault(launch.kernel.hash, []).append(launch)
    ways: dict[str, int] = {}
    for same in by_hash.values():
        name = same[0].kernel.name
        ways[name] = ways.get(name, 0) + 1
        label = name if ways[name] == 1 else f"{name}#{ways[name]}"
        programs = max(math.prod(launch.grid) for launch in same)
        found = resources(same[0], TARGETS[target])
        yield Row(case, direction, label, target, programs, len(same), found)


def count(names: Sequence[str]) -> list[Count]:
    """Interpret the small problems, and set what they move beside what the formulas say.

    Raises RuntimeError with the interpreter's words when a kernel fails in it.
    """
    command = [sys.executable, "-m", "kernels.audit.counting", *names]
    settings = {"TRITON_INTERPRET": "1", "TRANSXSSM_KERNELS": "triton", "TRANSXSSM_STRICT": "1"}
    run = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"counting traffic failed:\n{run.stderr}")
    counts = []
    for name, directions in json.loads(run.stdout).items():
        formulas = find(name).small.work(SMALL_TARGET)
        for direction, (loaded, stored, atomic) in directions.items():
            formula = formulas[direction].traffic
            counts.append(Count(name, direction, Traffic(loaded, stored), atomic, formula))
    return counts


def disagreements(found: Count) -> Iterator[Violation]:
    """A formula that does not say what the kernels do is a violation."""
    counted, formula = found.counted, found.formula
    if counted != formula:
        sentence = (
            f"loads {counted.loaded:,} and stores {counted.stored:,} bytes when interpreted;"
            f" the formula says {formula.loaded:,} and {formula.stored:,}"
        )
        yield Violation(found.case, found.direction, "interpreter", "traffic", sentence)
