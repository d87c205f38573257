"""The wheel built from this repository: the named packages, all of them, and nothing else."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    "benchmarks", "checkpoints_tools", "data_pipeline", "kernels", "parallel", "pretrain", "slurm",
    "untrusted",
}  # fmt: skip
# what a build reads: copied, so that no build folder appears in the repository
SOURCES = [*sorted(TOP_LEVEL), "tests", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out)]
    if _setuptools_suffices():
        command.append("--no-build-isolation")
    done = subprocess.run([*command, str(tree)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def _setuptools_suffices() -> bool:
    """Whether this environment's setuptools can build (77 brought licence expressions)."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def _members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_named_packages_only(wheel: Path) -> None:
    top = {name.split("/")[0] for name in _members(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == TOP_LEVEL


def test_wheel_holds_every_module_of_the_packages(wheel: Path) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in TOP_LEVEL
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".sbatch")
    }
    assert wanted - _members(wheel) == set(), "name the subpackage in pyproject.toml's packages"


def test_wheel_has_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        assert "transxssm = pretrain.__main__:main" in archive.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_listed_packages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in listed} == TOP_LEVEL
    assert all((ROOT / name.replace(".", "/") / "__init__.py").exists() for name in listed)


def test_unzipped_wheel_imports_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import importlib, pathlib, sys\n"
        "for name in ['kernels', 'parallel.config', 'pretrain.config']:\n"
        "    file = pathlib.Path(importlib.import_module(name).__file__)\n"
        "    assert file.is_relative_to(sys.argv[1]), file\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", "reading a configuration must not import torch"
