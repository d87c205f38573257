"""Wild configurations and damaged files of every kind, given to every command that reads them.

    python -m benchmarks.fuzz [--minutes 20] [--seed 0] [--jobs 2] [--out runs/fuzz] [--case N]

Text, tokenizer, data in three formats, a finished run with checkpoints, an exported model, an old
checkpoint and Slurm's records are made once. Each case then takes a copy and by its number

- either generates a configuration with wild values in up to three fields, for `pretrain`,
  `estimate`, `submit` and the others that validate it,
- or damages a file (other bytes, values, or a folder, pipe, link or device in its place; half of
  the time with checksums made right again), and runs a command that reads it.

A case fails when the command prints a traceback, is ended by a signal, prints control characters or
nothing at all with an error, takes longer than --limit seconds or more than 3 GiB of memory, or
writes outside its folder. Exits with 1 if any did. What failed stays in --out; --case runs one case
again and shows what it printed.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import fuzz_folder
from benchmarks.fuzz_cases import Result, run_case
from benchmarks.fuzz_commands import COMMANDS, CONFIGURED
from benchmarks.fuzz_process import import_all

GRACE = 60.0  # seconds beyond a command's limit, to prepare and judge it
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
PROGRESS_SECONDS = 30.0


def main(arguments: list[str]) -> int:
    """Run cases until the time is over; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.fuzz")
    parser.add_argument("--minutes", type=float, default=20.0, help="[20]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="[one a core]")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a command [60]")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="[runs/fuzz]")
    parser.add_argument("--case", type=int, help="run this case alone")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False, width=150)
    import_all()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=IN_MEMORY) as name:
        base = Path(name) / "base"
        fuzz_folder.prepare(base)
        if (threads := len(os.listdir("/proc/self/task"))) > 1:
            raise RuntimeError(f"{threads} threads, and processes are forked from one of them")
        pool = Pool(base, out, options.seed, options.limit)
        if options.case is not None:
            pool.start(options.case)
            results = pool.finished(wait=True)
            console.print(*(f"{r.damage}\n{r.output}" for r in results), markup=False)
        else:
            results = _run(pool, options.minutes * 60, options.jobs, console)
    return report(results, console)


class Pool:
    """Cases in processes of their own."""

    def __init__(self, base: Path, out: Path, seed: int, limit: float) -> None:
        self.base, self.out, self.seed, self.limit = base, out, seed, limit
        self.running: dict[int, tuple[int, float]] = {}  # by process: the case, and since when

    def start(self, number: int) -> None:
        """Begin a case."""
        process = os.fork()
        if process:
            self.running[process] = number, time.monotonic()
            return
        try:
            folder = self.base.parent / str(number)
            result = run_case(number, self.seed, self.base, folder, self.limit)
            if result.fault:
                shutil.rmtree(self.out / f"case-{number}", ignore_errors=True)
                shutil.move(folder, self.out / f"case-{number}")
            self._file(number).write_text(json.dumps(asdict(result)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def finished(self, wait: bool = False) -> list[Result]:
        """Results of the cases that have ended; of all, with `wait`."""
        found = []
        while self.running:
            for process, (number, begun) in list(self.running.items()):
                late = time.monotonic() - begun > self.limit + GRACE
                if late:
                    os.kill(process, signal.SIGKILL)
                ended, _ = os.waitpid(process, 0 if late else os.WNOHANG)
                if not ended:
                    continue
                del self.running[process]
                found.append(self._result(number))
            if (found and not wait) or not self.running:
                return found
            time.sleep(0.05)
        return found

    def _result(self, number: int) -> Result:
        file = self._file(number)
        if file.exists():
            result = Result(**json.loads(file.read_text()))
            file.unlink()
            return result
        return Result(number, "?", "", 0, 0.0, 0.0, "the case itself failed or did not end", "")

    def _file(self, number: int) -> Path:
        return self.base.parent / f"result-{number}.json"


def _run(pool: Pool, seconds: float, jobs: int, console: Console) -> list[Result]:
    begin, shown, number = time.monotonic(), 0.0, 0
    results: list[Result] = []
    while True:
        over = time.monotonic() - begin > seconds
        while len(pool.running) < jobs and not over:
            pool.start(number)
            number += 1
        new = pool.finished(wait=over)
        results += new
        for result in new:
            if result.fault:
                console.print(_line(result), style="red")
        if time.monotonic() - begin > shown + PROGRESS_SECONDS:
            shown = time.monotonic() - begin
            failed = sum(bool(result.fault) for result in results)
            console.print(f"{shown / 60:.1f} min: {len(results)} cases, {failed} failed")
        if over:
            return sorted(results, key=lambda result: result.number)


def _line(result: Result) -> str:
    return f"case {result.number}, {result.command}: {result.fault} [{result.damage}]"


def report(results: list[Result], console: Console) -> int:
    """Print the table by command, and what failed; 1 if anything did."""
    table = Table("command", "cases", "ran", "refused", "failed", "slowest, s", "largest, MB")
    counts: Counter[str] = Counter()
    for name in [*COMMANDS, *CONFIGURED, "?"]:
        of = [result for result in results if result.command == name]
        if not of:
            continue
        failed = sum(bool(result.fault) for result in of)
        ran = sum(result.code in (0, 85) and not result.fault for result in of)
        counts.update(cases=len(of), ran=ran, failed=failed)
        slowest, largest = max(r.seconds for r in of), max(r.megabytes for r in of)
        row = (len(of), ran, len(of) - ran - failed, failed)
        table.add_row(name, *map(str, row), f"{slowest:.1f}", f"{largest:,.0f}")
    console.print(table)
    for result in results:
        if result.fault:
            console.print(_line(result), style="red")
    refused = counts["cases"] - counts["ran"] - counts["failed"]
    console.print(f"{counts['cases']} cases: {counts['ran']} ran, {refused} were refused, "
                  f"{counts['failed']} failed")  # fmt: skip
    return 1 if counts["failed"] or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
