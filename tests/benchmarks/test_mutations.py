"""The list of mutants fits the code as it is; and a campaign over a tree of a few lines."""

import ast
import io
import re
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import mutations
from benchmarks.mutations import ROOT, CampaignError, Mutant, load_mutants, report, run_campaign

MUTANTS = load_mutants()
REWRITTEN = {
    f"parallel/{name}.py" for name in ("zero", "layers", "projections", "loss", "schedule")
}


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_mutants_fit_their_files(file: str) -> None:
    text = (ROOT / file).read_text()
    tree = ast.dump(ast.parse(text))
    for mutant in MUTANTS:
        if mutant.file == file:
            assert ast.dump(ast.parse(mutant.applied(text))) != tree, mutant.name


def test_their_tests_exist() -> None:
    for mutant in MUTANTS:
        assert mutant.tests, mutant.name
        for test in mutant.tests:
            file, _, node = test.partition("::")
            assert (ROOT / file).exists(), mutant.name
            assert mutant.interpreted == file.startswith("tests/interpreted/"), mutant.name
            name = node.partition("[")[0]
            assert not name or f"def {name}(" in (ROOT / file).read_text(), mutant.name


def test_they_cover_every_folder_and_what_speed_work_rewrites() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name.partition(".")[0] for name in packages["packages"]} - {"benchmarks"}
    assert {mutant.file.partition("/")[0] for mutant in MUTANTS} == folders
    inner = [m for m in MUTANTS if m.file in REWRITTEN or m.file.startswith("kernels/")]
    assert 3 * len(inner) >= len(MUTANTS)
    named = [mutant for mutant in MUTANTS if mutant.named]
    assert len(named) >= 18
    assert len(MUTANTS) - len(named) >= 90


# -- a campaign ------------------------------------------------------------------------------------

CODE = """
def largest(values):
    found = values[0]
    for value in values:
        if value > found:
            found = value
    return found
"""
TESTS = """
import os, subprocess, sys
import toy

def test_largest():
    assert toy.largest([1, 3, 2]) == 3

def test_in_a_process_of_its_own():
    command = "import toy, sys; sys.exit(toy.largest([1, 2]) - 2)"
    assert not subprocess.run([sys.executable, "-c", command]).returncode

def test_in_a_forked_rank():
    import multiprocessing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])
    pipe, other = context.Pipe(duplex=False)
    context.Process(target=toy.send_largest, args=(other, [4, 5])).start()
    assert pipe.recv() == 5
"""
SENDER = """
def send_largest(pipe, values):
    pipe.send(largest(values))
"""


def toy_mutant(name: str, old: str, new: str, test: str = "", **fields: str) -> Mutant:
    tests = ("tests/test_toy.py" + test,)
    return Mutant(name, "toy/__init__.py", old, new, tests, folder="toy", **fields)  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "toy").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "toy/__init__.py").write_text(CODE + SENDER)
    (root / "tests/test_toy.py").write_text(TESTS)
    return root


def run(
    tree: Path, mutants: list[Mutant], jobs: int = 1, limit: float = 60
) -> tuple[dict[str, str], str, int]:
    """Verdicts, what was printed, and the exit code."""
    console = Console(file=io.StringIO(), width=200, color_system=None)
    out = tree.parent / "out"
    verdicts = run_campaign(mutants, tree, out, jobs, (), console, limit)
    code = report(mutants, verdicts, console)
    assert isinstance(console.file, io.StringIO)
    found = {name: f"{v['verdict']} {v['by'].rpartition('::')[2]}" for name, v in verdicts.items()}
    return found, console.file.getvalue(), code


def test_a_campaign_tells_what_was_seen_and_goes_on(tree: Path) -> None:
    compared = "value > found"
    mutants = [
        toy_mutant("smallest", compared, "value < found"),
        toy_mutant("in a process", compared, "value < found", "::test_in_a_process_of_its_own"),
        toy_mutant("in a rank", compared, "value < found", "::test_in_a_forked_rank"),
        toy_mutant("equal ones", compared, "value >= found", reason="equivalent"),
    ]
    found, printed, code = run(tree, mutants, jobs=2)
    assert found == {
        "smallest": "killed test_largest",
        "in a process": "killed test_in_a_process_of_its_own",
        "in a rank": "killed test_in_a_forked_rank",
        "equal ones": "survived ",
    }
    assert "3 of 4 killed, 75.0%" in printed
    assert re.search("equal ones.*equivalent", printed)
    assert code == 1
    # another time nothing is tried but what has changed
    endless = "import time; time.sleep(99)\n"
    mutants[3] = toy_mutant("no end", "return found\n", endless, "::test_largest")
    found, printed, code = run(tree, mutants, limit=8)
    assert "3 known; 1 to try" in printed
    assert found["no end"] == "timed out "
    assert code == 0
    assert (tree / "toy/__init__.py").read_text() == CODE + SENDER


def test_what_says_nothing_is_an_error(tree: Path) -> None:
    with pytest.raises(CampaignError, match=r"'twice': its old text stands 2 times in toy/__init"):
        run(tree, [toy_mutant("twice", "found = value", "found = -value")])
    (tree / "tests/test_toy.py").write_text("def test_largest():\n    assert False\n")
    with pytest.raises(CampaignError, match=r"of 'any' do not pass without a fault.*test_largest"):
        run(tree, [toy_mutant("any", "value > found", "value < found")])


def test_a_name_that_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutations.main(["--only", "nothing of this name"]) == 2
    assert "no mutant is called nothing of this name" in capsys.readouterr().out
