"""Single silent faults put into the code: do the tests that mirror it see them?

    python -m benchmarks.mutations [--only NAME...] [--jobs 1] [--out runs/mutations]

A mutant is an entry of `benchmarks/mutants/*.toml`, one file for every folder of the product:

    [[mutant]]
    name = "zero: gradients of replicas summed, not averaged"
    file = "parallel/zero.py"
    old = "..."             exact text that stands once in the file
    new = "..."             what takes its place
    tests = ["tests/..."]   files or node ids
    interpreted = true      tests below tests/interpreted, under TRITON_INTERPRET=1
    named = true            a survivor of an earlier campaign
    reason = "..."          why it may survive

Every job has a copy of the tree and a server of warm pytest processes (`benchmarks.warm_pytest`).
Mutant after mutant is put into it, and its tests run until one fails, which must pass in the copy
as it was. A mutant whose tests do not end is killed by the time limit.
Results are kept in --out, and a campaign that was stopped goes on: a mutant runs again where it or
its file has changed, a survivor also where its tests have. Exits with 1 where fewer than 95 % of
the mutants are killed.
"""

import argparse
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
MUTANTS = Path(__file__).with_name("mutants")
WANTED = 0.95
LIMIT = 120.0  # seconds for the tests of a mutant
BASE_LIMIT = 600.0  # in the tree as it is
# the same examples for every mutant as for the tree as it is
PYTEST = ("-q", "-p", "no:cacheprovider", "--tb=short", "--hypothesis-seed=0")
NOT_RUN, NOT_FOUND = 4, 5  # exit codes of pytest
LEFT_OUT = ("__pycache__", "runs", "data", "build", "shared", "*.egg-info", ".*")
SLOW_IMPORTS = (
    "torch", "torch.distributed.checkpoint", "torch._dynamo", "triton", "triton.language",
    "deepspeed", "deepspeed.comm.torch", "deepspeed.runtime.bf16_optimizer",
    "megatron.core.parallel_state", "megatron.core.tensor_parallel",
    "megatron.core.pipeline_parallel", "megatron.core.transformer", "transformers", "tokenizers",
    "streaming", "webdataset", "pyarrow.parquet", "zstandard", "safetensors.torch", "hypothesis",
    "tensorboard", "torch.utils.tensorboard", "pydantic", "typer", "rich.console", "numpy",
)  # fmt: skip

T = TypeVar("T")
R = TypeVar("R")


class CampaignError(Exception):
    """The campaign cannot say anything: a mutant that does not fit, or tests that fail anyway."""


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests that are to see it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    folder: str = ""
    """Stem of the file that describes it."""
    interpreted: bool = False
    named: bool = False
    reason: str = ""

    def applied(self, text: str) -> str:
        """The file's text with the fault. Raises CampaignError unless `old` stands there once."""
        if (count := text.count(self.old)) != 1:
            raise CampaignError(
                f"mutant {self.name!r}: its old text stands {count} times in {self.file}, not once;"
                f" bring benchmarks/mutants/{self.folder}.toml up to date"
            )
        return text.replace(self.old, self.new)

    def key(self, root: Path) -> str:
        """A digest of itself and of its file."""
        return _digest(self.old, self.new, (root / self.file).read_text())

    def tests_key(self, root: Path) -> str:
        """A digest of its tests."""
        files = dict.fromkeys(test.partition("::")[0] for test in self.tests)
        return _digest(*self.tests, *((root / name).read_text() for name in files))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """Of a run of tests."""

    failed: list[str]
    timed_out: bool
    seconds: float
    log: str


def load_mutants(folder: Path = MUTANTS) -> list[Mutant]:
    """All mutants below a folder. Raises CampaignError for two of one name."""
    found: list[Mutant] = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutant"]:
            tests = tuple(entry.pop("tests"))
            found.append(Mutant(tests=tests, folder=path.stem, **entry))
    names = [mutant.name for mutant in found]
    for name in names:
        if names.count(name) > 1:
            raise CampaignError(f"two mutants are called {name!r}")
    return found


class Bench:
    """A scratch copy of the tree, and servers that run its tests."""

    def __init__(self, root: Path, folder: Path, imports: Sequence[str]) -> None:
        self.tree, self.folder, self.imports = folder / "tree", folder, imports
        shutil.copytree(root, self.tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        self._servers: dict[bool, subprocess.Popen[str]] = {}
        self._writes = 0

    def run(self, tests: Sequence[str], interpreted: bool, limit: float, *options: str) -> Outcome:
        """Run tests in the tree as it now is. Raises CampaignError where the server dies."""
        begin = time.monotonic()
        tmp = self.folder / "tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(mode=0o1777)
        result, log = self.folder / "result.json", self.folder / "log"
        result.unlink(missing_ok=True)
        request = {
            "folder": str(self.tree), "tmp": str(tmp), "limit": limit,
            "result": str(result), "log": str(log),
            "arguments": [*PYTEST, *options, *tests],
        }  # fmt: skip
        answer = self._ask(interpreted, request)
        text = log.read_text(errors="replace") if log.exists() else ""
        seconds = time.monotonic() - begin
        if answer["code"] is None:
            return Outcome([], True, seconds, text)
        if answer["code"] in (NOT_RUN, NOT_FOUND):
            raise CampaignError(f"pytest finds no tests in {', '.join(tests)}:\n{text[-2000:]}")
        if not result.exists():
            return Outcome([f"(exit code {answer['code']})"], False, seconds, text)
        found = json.loads(result.read_text())
        if found["strays"]:
            raise CampaignError(f"modules of another copy were tested: {found['strays'][:3]}")
        failed = list(found["failed"])
        if answer["code"] and not failed:
            failed = [f"(exit code {answer['code']})"]
        return Outcome(failed, False, seconds, text)

    def write(self, name: str, text: str) -> None:
        """Change a file of the tree; Python tells by its time that it is another."""
        path = self.tree / name
        path.write_text(text)
        self._writes += 1
        os.utime(path, (1e9 + self._writes, 1e9 + self._writes))

    def _ask(self, interpreted: bool, request: dict[str, Any]) -> dict[str, Any]:
        if interpreted not in self._servers:
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            if interpreted:
                environment["TRITON_INTERPRET"] = "1"
            program = str(Path(__file__).with_name("warm_pytest.py"))
            self._servers[interpreted] = subprocess.Popen(
                [sys.executable, "-P", program, *self.imports], cwd=self.folder, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            self._line(interpreted, "ready")
        server = self._servers[interpreted]
        assert server.stdin is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line(interpreted, '{"code'))
        return answer

    def _line(self, interpreted: bool, begin: str) -> str:
        """The next line that begins so: what is imported may print others."""
        server = self._servers[interpreted]
        assert server.stdout is not None
        for line in server.stdout:
            if line.startswith(begin):
                return line
        raise CampaignError(f"the server of warm pytest processes ended with {server.wait()}")

    def close(self) -> None:
        """End the servers."""
        for server in self._servers.values():
            assert server.stdin is not None
            server.stdin.close()
            server.wait()


class Benches:
    """As many benches as jobs; each works for one caller at a time."""

    def __init__(self, root: Path, folder: Path, jobs: int, imports: Sequence[str]) -> None:
        self.all = [Bench(root, folder / str(job), imports) for job in range(jobs)]
        self._free: queue.SimpleQueue[Bench] = queue.SimpleQueue()
        for bench in self.all:
            self._free.put(bench)

    def each(self, function: Callable[[Bench, T], R], items: Sequence[T]) -> list[R]:
        """function(bench, item) of all items. Raises the first exception, once all have ended."""

        def one(item: T) -> R:
            bench = self._free.get()
            try:
                return function(bench, item)
            finally:
                self._free.put(bench)

        with ThreadPoolExecutor(len(self.all)) as pool:
            return list(pool.map(one, items))

    def close(self) -> None:
        """End the servers."""
        for bench in self.all:
            bench.close()


class Judge:
    """Puts mutants into benches; believes a test that fails only if it passes without a fault."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._sound: dict[tuple[bool, tuple[str, ...]], float] = {}

    def verdict(self, bench: Bench, mutant: Mutant) -> dict[str, Any]:
        """{name, verdict, by, seconds}: killed, timed out or survived. Raises CampaignError."""
        text = (bench.tree / mutant.file).read_text()
        bench.write(mutant.file, mutant.applied(text))
        try:
            outcome = bench.run(mutant.tests, mutant.interpreted, self.limit, "-x")
        finally:
            bench.write(mutant.file, text)
        verdict = "killed" if outcome.failed else "timed out" if outcome.timed_out else "survived"
        by = outcome.failed[0] if outcome.failed else ""
        if verdict != "survived":
            base = self._check(bench, mutant, (by,) if "::" in by else mutant.tests)
            if verdict == "timed out" and base > self.limit / 2:
                raise CampaignError(
                    f"tests of {mutant.name!r} take {base:.0f} s without a fault: too long for a "
                    f"limit of {self.limit:.0f} s to tell anything; name fewer, or free the machine"
                )
        seconds = round(outcome.seconds, 1)
        return {"name": mutant.name, "verdict": verdict, "by": by, "seconds": seconds}

    def _check(self, bench: Bench, mutant: Mutant, tests: tuple[str, ...]) -> float:
        """Seconds that tests take in the tree as it is. Raises CampaignError where they fail."""
        key = (mutant.interpreted, tests)
        if key in self._sound:
            return self._sound[key]
        outcome = bench.run(tests, mutant.interpreted, BASE_LIMIT)
        if outcome.timed_out or outcome.failed:
            found = "time is up" if outcome.timed_out else ", ".join(outcome.failed)
            raise CampaignError(
                f"tests of {mutant.name!r} do not pass without a fault ({found}):\n"
                f"{outcome.log[-3000:]}"
            )
        self._sound[key] = outcome.seconds
        return outcome.seconds


def run_campaign(
    mutants: Sequence[Mutant],
    root: Path,
    out: Path,
    jobs: int,
    imports: Sequence[str],
    console: Console,
    limit: float = LIMIT,
) -> dict[str, dict[str, Any]]:
    """Verdicts by the mutants' names, from --out as far as they are there."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "results.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    known = {entry["key"]: entry for entry in map(json.loads, lines)}
    for mutant in mutants:
        mutant.applied((root / mutant.file).read_text())
    keys = {m.name: {"key": m.key(root), "tests": m.tests_key(root)} for m in mutants}
    verdicts = {}
    for name, key in keys.items():
        entry = known.get(key["key"])
        if entry and (entry["verdict"] != "survived" or entry["tests"] == key["tests"]):
            verdicts[name] = entry | {"name": name}
    pending = [mutant for mutant in mutants if mutant.name not in verdicts]
    if not pending:
        return verdicts
    with tempfile.TemporaryDirectory(prefix="mut") as name:
        benches = Benches(root, Path(name), jobs, imports)
        try:
            console.print(f"{len(verdicts)} known; {len(pending)} to try", style="dim")
            judge = Judge(limit)

            def attempt(bench: Bench, mutant: Mutant) -> CampaignError | None:
                try:
                    verdict = judge.verdict(bench, mutant) | keys[mutant.name]
                except CampaignError as error:
                    console.print(f"{mutant.folder}: {mutant.name}: {error}", style="red")
                    return error
                verdicts[mutant.name] = verdict
                with record.open("a") as file:
                    file.write(json.dumps(verdict) + "\n")
                console.print(
                    f"{len(verdicts)}/{len(mutants)} {mutant.folder}: {mutant.name}: "
                    f"{verdict['verdict']} {verdict['by']} ({verdict['seconds']} s)",
                    style="dim",
                )
                return None

            errors = [error for error in benches.each(attempt, pending) if error is not None]
            if errors:
                raise CampaignError(f"{len(errors)} mutants could not be tried; first: {errors[0]}")
        finally:
            benches.close()
    return verdicts


def report(mutants: Sequence[Mutant], verdicts: dict[str, dict[str, Any]], console: Console) -> int:
    """Print the tables; 1 where too few are killed."""
    table = Table("folder", "mutants", "killed", "by time", "survived", "seconds")
    for folder in dict.fromkeys(mutant.folder for mutant in mutants):
        of = [verdicts[mutant.name] for mutant in mutants if mutant.folder == folder]
        counts = [sum(v["verdict"] == k for v in of) for k in ("killed", "timed out", "survived")]
        seconds = sum(verdict["seconds"] for verdict in of)
        table.add_row(folder, str(len(of)), *map(str, counts), f"{seconds:.0f}")
    console.print(table)
    survivors = [m for m in mutants if verdicts[m.name]["verdict"] == "survived"]
    if survivors:
        table = Table("survivor", "file", "reason")
        for mutant in survivors:
            table.add_row(mutant.name, mutant.file, mutant.reason or "NO REASON IS GIVEN")
        console.print(table)
    killed = len(mutants) - len(survivors)
    named = [mutant for mutant in mutants if mutant.named]
    console.print(
        f"{killed} of {len(mutants)} killed, {killed / max(1, len(mutants)):.1%};"
        f" of {len(named)} that survived before, {len(named) - sum(m.named for m in survivors)}"
    )
    return 0 if killed >= WANTED * len(mutants) else 1


def main(arguments: list[str]) -> int:
    """Run, or go on with, the campaign; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.mutations")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants, or files of them")
    parser.add_argument("--jobs", type=int, default=1, help="[1]")
    parser.add_argument("--out", type=Path, default=Path("runs/mutations"))
    options = parser.parse_args(arguments)
    console = Console(highlight=False, markup=False, width=140)
    try:
        mutants = load_mutants()
        if options.only:
            unknown = set(options.only) - {n for m in mutants for n in (m.name, m.folder)}
            if unknown:
                raise CampaignError(f"no mutant is called {', '.join(sorted(unknown))}")
            mutants = [m for m in mutants if {m.name, m.folder} & set(options.only)]
        verdicts = run_campaign(mutants, ROOT, options.out, options.jobs, SLOW_IMPORTS, console)
    except CampaignError as error:
        console.print(f"error: {error}", style="red")
        return 2
    return report(mutants, verdicts, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
