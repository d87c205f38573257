"""Fifteen minutes on a GPU, spent in order of value.

    python -m benchmarks.gpu_day [--minutes 8] [--resume FOLDER] [--page docs/gpu.md]
    python -m benchmarks.gpu_day --dry-run     # the whole list on a CPU, at sizes without meaning

Every measurement runs in a process of its own under a time limit and is written to
FOLDER/NAME.json as it ends, so that a cut-off loses one; `--resume` makes those that are missing or
failed.
What no longer fits into the minutes is left out, and named. FOLDER/page.md has the tables;
`--page` puts them into a document between its two comments `gpu_day: begin` and `gpu_day: end`,
and refuses to do so with the numbers of a dry run.

Wanted on that machine: the project's packages, with torch of 2.12 or newer (older ones lack
`enable_gqa` in `varlen_attn`). Where it has no network, carry the wheels:

    pip download --dest wheels '.[dev]'                               # here
    pip install --no-index --find-links wheels --editable '.[dev]'    # there
"""

import argparse
import json
import multiprocessing
import platform
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_day_measurements as measurements
from benchmarks.gpu_day_page import page, put_into
from untrusted.files import write_durably

FOLDER = Path("runs/gpu_day")
SHORTEST = 10.0  # seconds that are worth a start
# Names of functions of gpu_day_measurements and the seconds each may take, most valuable first
PLAN = (
    ("self_check", 90),
    ("training_320m", 100),
    ("profile_320m", 45),
    ("launch_floor", 15),
    ("layers", 45),
    ("scans", 60),
    ("products", 15),
    ("head", 15),
    ("training_320m_long", 90),
    ("training_1_3b", 100),
    ("compiled_320m", 120),
    ("untried", 180),
    ("tuning", 240),
)
_context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA has none


@dataclass(frozen=True)
class Outcome:
    """Of one measurement, as its JSON file has it."""

    name: str
    device: str
    software: str
    stand_in: bool
    """Whether the figures are those of a dry run."""
    seconds: float
    rows: list[dict[str, Any]]
    error: str = ""


def measure(name: str, dry_run: bool, path: Path, go: Any) -> None:
    """Run a measurement in this process once `go` is set, and write its outcome.

    Importing the project takes seconds, which pass while the measurement before this one runs.
    """
    go.wait()
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    error = ""
    if dry_run:
        torch.set_num_threads(1)
    try:
        rows = getattr(measurements, name)(dry_run)
    except Exception:
        error = traceback.format_exc()
    outcome = Outcome(
        name, device_name(), software(), dry_run, time.perf_counter() - begin, rows, error
    )
    write_durably(path, json.dumps(vars(outcome), indent=1).encode())


def device_name() -> str:
    """The card's name, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def software() -> str:
    """Versions that the figures depend on."""
    from pretrain.run_dir import git_revision, package_versions

    names = ("torch", "triton", "deepspeed", "megatron-core")
    versions = package_versions()
    found = [f"{name} {versions[name]}" for name in names if name in versions]
    return ", ".join(
        [f"Python {platform.python_version()}", *found, f"revision {git_revision()[:12]}"]
    )


def run_plan(folder: Path, minutes: float, dry_run: bool) -> list[Outcome]:
    """Every measurement that there is time for, the outcomes of earlier runs included."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + minutes * 60
    outcomes = []
    waiting: list[tuple[str, int]] = []
    for name, limit in PLAN:
        earlier = read_outcome(folder / f"{name}.json")
        if earlier is not None and not earlier.error:
            print(f"{name}: done before", flush=True)
            outcomes.append(earlier)
        else:
            waiting.append((name, limit))
    upcoming = Worker(waiting[0][0], dry_run, folder) if waiting else None
    for number, (name, limit) in enumerate(waiting, start=1):
        worker, upcoming = upcoming, None
        assert worker is not None
        if number < len(waiting) and end - time.monotonic() > SHORTEST:
            upcoming = Worker(waiting[number][0], dry_run, folder)
        left = end - time.monotonic()
        print(f"{name}: at most {min(left, limit):.0f} s ...", end=" ", flush=True)
        said = worker.run(min(left, limit))
        print(said, flush=True)
        if (outcome := read_outcome(worker.path)) is not None:
            outcomes.append(outcome)
        if upcoming is None:
            for missed, _ in waiting[number:]:
                print(f"{missed}: left out, the time is up", flush=True)
            break
    order = [name for name, _ in PLAN]
    return sorted(outcomes, key=lambda outcome: order.index(outcome.name))


class Worker:
    """A process that has imported what a measurement needs, and waits to begin it."""

    def __init__(self, name: str, dry_run: bool, folder: Path) -> None:
        self.path, self.go = folder / f"{name}.json", _context.Event()
        self.path.unlink(missing_ok=True)  # of a measurement that failed
        arguments = (name, dry_run, self.path, self.go)
        self.process = _context.Process(target=measure, args=arguments, daemon=False)
        self.process.start()

    def run(self, limit: float) -> str:
        """Measure for at most `limit` seconds; says how it ended."""
        begin = time.monotonic()
        self.go.set()
        self.process.join(limit)
        cut_off = self.process.is_alive()
        self.process.kill()
        self.process.join()
        took = f"({time.monotonic() - begin:.0f} s)"
        if (outcome := read_outcome(self.path)) is not None:
            last = outcome.error.strip().splitlines()[-1] if outcome.error else "done"
            return f"{last} {took}"
        return f"{'cut off' if cut_off else f'ended with {self.process.exitcode}'} {took}"


def read_outcome(path: Path) -> Outcome | None:
    """What a measurement has written; None where it has not."""
    if not path.exists():
        return None
    return Outcome(**json.loads(path.read_text()))


def main(arguments: list[str] | None = None) -> int:
    """Run the plan. Returns 1 where a measurement failed or was left out."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_day", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=8.0, help="[8]")
    parser.add_argument("--resume", type=Path, help="go on with this folder")
    parser.add_argument("--page", type=Path, help="document to put the tables into")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, without meaning")
    given = parser.parse_args(arguments)
    if given.dry_run and given.page:
        parser.error("--page with --dry-run: a dry run's numbers belong into no document")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("this host has no GPU that torch can use; --dry-run walks the list on a CPU")
    if given.resume is not None and not given.resume.is_dir():
        parser.error(f"--resume {given.resume}: there is no such folder")
    folder = given.resume or FOLDER / time.strftime("%Y%m%d-%H%M%S")
    print(f"{device_name()}; outcomes in {folder}", flush=True)
    outcomes = run_plan(folder, given.minutes, given.dry_run)
    (folder / "page.md").write_text(page([vars(outcome) for outcome in outcomes]))
    print(f"tables: {folder / 'page.md'}")
    if given.page:
        put_into(given.page, [vars(outcome) for outcome in outcomes])
    failed = [outcome.name for outcome in outcomes if outcome.error]
    print(f"gpu_day: {len(outcomes) - len(failed)} of {len(PLAN)} measured")
    return 0 if len(outcomes) == len(PLAN) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
