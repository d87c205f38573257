"""One case of benchmarks.fuzz by its number: what is damaged, which command runs, what is wrong."""

import os
import random
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import fuzz_folder
from benchmarks.damage import ESCAPED, damage_file, toml
from benchmarks.fuzz_commands import COMMANDS, CONFIGURED, Command
from benchmarks.fuzz_configs import is_light, wild_config
from benchmarks.fuzz_process import Limits, fault, run_forked
from benchmarks.resealing import reseal

CONFIG_SHARE = 0.3  # of all cases
STOP_AFTER = 15.0  # seconds, of what trains
FOLDER_BYTES = 512 << 20  # that a case may leave behind
INSIDE = ["home", "output", "outside", "tmp", "work"]
PRECIOUS = "of somebody else"


@dataclass(frozen=True)
class Result:
    """What became of a case."""

    number: int
    command: str
    damage: str
    code: int
    seconds: float
    megabytes: float
    fault: str
    """What is wrong; empty: nothing."""
    output: str


def run_case(number: int, seed: int, base: Path, folder: Path, limit: float) -> Result:
    """Run a case in `folder`, which is made, and is removed unless it fails."""
    choice = random.Random(f"{seed} {number}")
    fuzz_folder.copy(base, folder)
    outside = make_outside(folder)
    configured = choice.random() < CONFIG_SHARE
    table = CONFIGURED if configured else COMMANDS
    name = choice.choices(list(table), [command.weight for command in table.values()])[0]
    command = table[name]
    os.chdir(folder / "work")
    done = _configure(choice, command) if configured else damage(choice, command, outside)
    if done.startswith("heavy"):
        name = "config: estimate"
        command = CONFIGURED[name]
    stop_after = STOP_AFTER if command.trains else None
    before = set(_names(folder))
    ended = run_forked(shlex.split(command.words), folder, Limits(limit, stop_after=stop_after))
    wrong = fault(ended) or trespass(folder, outside, before)
    os.chdir("/")
    if not wrong:
        shutil.rmtree(folder)
    output = ended.output.decode(errors="backslashreplace")
    return Result(number, name, done, ended.code, ended.seconds, ended.megabytes, wrong, output)


def make_outside(folder: Path) -> Path:
    """Make the place that hostile names lead to."""
    outside = folder / "outside"
    outside.mkdir()
    (outside / "precious").write_text(PRECIOUS)
    (outside / "zero").symlink_to("/dev/zero")
    return outside


def _configure(choice: random.Random, command: Command) -> str:
    """Write wild.toml in the working folder."""
    while True:
        tree, what = wild_config(choice, fuzz_folder.TREE | {"model": fuzz_folder.MODEL})
        tree_of_run = tree.get("logging")
        if isinstance(tree_of_run, dict) and tree_of_run.get("run_dir") == "run":
            tree_of_run["run_dir"] = choice.choice(["new", "run"])
        try:
            Path("wild.toml").write_bytes(toml(tree))
        except (TypeError, ValueError):  # no TOML can say it
            continue
        return what if is_light(tree) or not command.builds else f"heavy: {what}"


def damage(choice: random.Random, command: Command, outside: Path) -> str:
    """Damage one file that the command reads, rarely two."""
    words = []
    for _ in range(choice.choice([1] * 9 + [2])):
        patterns = [choice.choice(command.reads)]
        files = _regular(patterns) or _regular(command.reads)
        if not files:
            continue
        file = choice.choice(files)
        what = damage_file(file, choice, outside)
        if choice.random() < 0.5:
            reseal(file)
            what += ", resealed"
        words.append(f"{file}: {what}")
    return "; ".join(words)


def _regular(patterns: "list[str] | tuple[str, ...]") -> list[Path]:
    found = {path for pattern in patterns for path in Path(".").glob(pattern)}
    found |= {path for pattern in patterns for path in Path(".").glob(f"../{pattern}")}
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def trespass(folder: Path, outside: Path, before: set[str]) -> str:
    """Files that a command may not have made or changed, in one line; or too large ones."""
    new = set(_names(folder)) - before
    if escaped := sorted(name for name in new if ESCAPED in name):
        return f"it made {escaped[0]!r}"
    if (outside / "precious").read_text() != PRECIOUS:
        return "it changed outside/precious"
    if sorted(os.listdir(folder)) != INSIDE:
        return f"it made a file beside its folders: {sorted(os.listdir(folder))}"
    if escaped := [str(up) for up in folder.parents if (up / ESCAPED).exists()]:
        return f"it made {escaped[0]}/{ESCAPED}"
    size = sum((folder / name).lstat().st_size for name in new)
    if size > FOLDER_BYTES:
        return f"it left {size / 1e6:,.0f} MB behind"
    return ""


def _names(folder: Path) -> Iterator[str]:
    for parent, _, files in os.walk(folder):
        for name in files:
            yield os.path.relpath(os.path.join(parent, name), folder)
