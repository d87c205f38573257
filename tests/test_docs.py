"""The documentation: it builds with strict links, its commands run, its messages exist."""

import ast
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pretrain.config import dump_config
from tests.pretrain.command import run_command
from tests.tiny import tiny_config, write_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = (
    "pretrain", "parallel", "kernels", "data_pipeline", "checkpoints_tools", "slurm", "untrusted",
)  # fmt: skip
# Run by other tests: of a cluster, of a GPU host, of minutes; and by whoever makes the environment
ELSEWHERE = {
    # with tasks of its own: the harness's are downloaded
    "transxssm evaluate model/ --tasks": "pretrain/evaluation/test_evaluate.py",
    "transxssm submit": "slurm/test_submit.py",
    "transxssm status runs/1.3b": "slurm/test_submit.py",
    "transxssm cancel": "slurm/test_submit.py",
    "transxssm logs": "slurm/test_submit.py",
    "sbatch": "slurm/test_training.py",
    "transxssm kernels audit": "compiled/test_sheet.py",
    "transxssm kernels launches": "pretrain/test_launches.py",
    "make gpu-check": "benchmarks/test_gpu_check.py",
    "make demo": "../Makefile",
    "make setup": "../.ci/run",
    "make test": "../.ci/run",
    "make lint": "../.ci/run",
    "transxssm kernels bench": "benchmarks/test_kernels.py",
    "transxssm kernels tune": "kernels/test_tuning.py",
    "tensorboard": "pretrain/test_metrics.py",  # reads the files that it would show
    "export": "test_docs.py",
}
MODEL = {"vocab_size": 32768, "num_heads": 4, "num_kv_heads": 4, "ssd_groups": 4,
         "max_position_embeddings": 2048}  # fmt: skip


def commands(page: Path) -> Iterator[str]:
    """Of its bash blocks, without comments; `$T` and paths of the environment made plain."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*", "", line)
            for command in line.split("; "):
                command = command.replace("$T", "transxssm").replace(".venv/bin/", "").strip()
                if command and not command.startswith(("#", "T=")):
                    yield command


def elsewhere(command: str) -> str | None:
    """The test file that runs it, if another one does."""
    if found := re.match(r"(?:python -m |.*)benchmarks\.(\w+)", command):
        return f"benchmarks/test_{found[1]}.py"
    return next((file for start, file in ELSEWHERE.items() if command.startswith(start)), None)


ALL = dict.fromkeys(command for page in PAGES for command in commands(page))
HERE = [command for command in ALL if elsewhere(command) is None]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documentation's commands take for granted."""
    folder = tmp_path_factory.mktemp("docs")
    write_text(folder / "corpus", 1_500_000)
    stories = [path.read_text() for path in sorted((folder / "corpus").iterdir())[:200]]
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    rows = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(stories))
    (folder / "web.json.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "README.md", folder)
    sections = {
        "model": MODEL, "data": {"seq_len": 2048},
        "training": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 1},
        "checkpoint": {"every": 1},
    }  # fmt: skip
    config = tiny_config(Path("data/mine"), Path("runs/mine"), **sections)
    for name in ("my.toml", "next.toml"):
        (folder / name).write_text(dump_config(config))
    return folder


@pytest.mark.parametrize("command", HERE)
def test_command_runs(command: str, sandbox: Path) -> None:
    """In the order of the pages: the README's make what the others use."""
    words = shlex.split(command)
    if command.startswith("transxssm evaluate"):
        words += ["--limit", "4", "--max-length", "2048"]
        words += ["--cases", "1"] if "--needle" in words else []
    places = [sorted(sandbox.glob(word)) if "*" in word else [word] for word in words[1:]]
    words[1:] = [str(word) for place in places for word in place]
    if words[0] == "transxssm":
        (end,) = run_command(*words[1:], before=partial(os.chdir, sandbox))
        assert end.code == 0, end.output
        return
    program = Path(sys.executable).with_name(words[0])
    done = subprocess.run(
        [program, *words[1:]], cwd=sandbox, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [command for command in ALL if elsewhere(command)])
def test_command_is_run_elsewhere(command: str) -> None:
    file = ROOT / "tests" / str(elsewhere(command))
    assert file.exists(), f"no test runs {command!r}: {file} is not there"


def test_pages_build_with_strict_links(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    built = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {page.stem for page in PAGES[1:]} - {"index"} <= built


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def literals(tree: ast.AST) -> Iterator[str]:
    """Every string of a module as it is printed, "…" for what is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_of_the_faq_are_printed_by_the_code() -> None:
    said = "\n".join(
        text
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for text in literals(ast.parse(path.read_text()))
    )
    table = (ROOT / "docs/faq.md").read_text().split("| message |")[1]
    messages = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(messages) >= 10
    for message in messages:
        for fragment in message.split("…"):
            assert fragment.strip(" /") in said, f"{message!r}: nothing says {fragment!r}"
