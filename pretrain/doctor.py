"""`transxssm doctor`: one line per check of this machine, and what to do where one is not OK.

The checks read metadata and import torch alone, so that they end within seconds and also run where
an engine's import is what fails. A check that raises is itself a failure.
"""

import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.text import Text

DISTRIBUTION = "transxssm"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [
    "torch", "triton", "megatron-core", "deepspeed", "mosaicml-streaming", "webdataset",
    "tensorboard", "tokenizers", "safetensors",
]  # fmt: skip
MODULES = ["kernels", "parallel", "pretrain", "data_pipeline", "slurm", "checkpoints_tools"]
SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30

Status = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """What one check found, and what to do if it is not OK."""

    name: str
    status: Status
    found: str
    advice: str = ""


def doctor() -> int:
    """Print every check. Returns 0 when none fails, else 1."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    style = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
    failed = 0
    for name, function in CHECKS:
        check = run_check(name, function)
        failed += check.status == "FAIL"
        line = Text(f"{check.status:<5}", style=style[check.status])
        console.print(line.append(f"{check.name:<27}{check.found}", style="default"))
        if check.advice:
            console.print(f"{'':32}→ {check.advice}")
    console.print(f"{failed} of {len(CHECKS)} checks fail" if failed else "no check fails")
    return 1 if failed else 0


def run_check(name: str, function: Callable[[str], Check]) -> Check:
    """The check's finding; an exception in it is one too."""
    try:
        return function(name)
    except Exception as error:
        return Check(name, "FAIL", f"{type(error).__name__}: {error}", "this check could not run")


# -- Python and packages ------------------------------------------------------------------------


def python(name: str) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{version} ({sys.executable})"
    try:
        wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "OK", found)
    if not SpecifierSet(wanted).contains(version):
        advice = "rm -r .venv; make setup PYTHON=/path/to/such/a/python"
        return Check(name, "FAIL", f"{found}, wanted {wanted}", advice)
    return Check(name, "OK", found)


def installed(name: str) -> Check:
    """The project itself, whose metadata has the bounds of the other packages."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "FAIL", "not installed in this environment", "make setup")
    return Check(name, "OK", f"{version} ({ROOT})")


def package(name: str) -> Check:
    """An installed version against the bounds in pyproject.toml."""
    wanted = _requirements().get(canonicalize_name(name))
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if _requirements() and wanted is None:
            return Check(name, "OK", "not installed, not needed on this platform")
        return Check(
            name, "FAIL", "not installed", f"make setup, or pip install '{wanted or name}'"
        )
    if wanted is None:
        return Check(name, "OK", f"{version} (no bounds known)")
    if not wanted.specifier.contains(version, prereleases=True):
        return Check(
            name, "FAIL", f"{version}, wanted {wanted.specifier}", f"pip install '{wanted}'"
        )
    return Check(name, "OK", f"{version} (wanted {wanted.specifier})")


@cache
def _requirements() -> dict[str, Requirement]:
    """Our requirements that apply on this platform, extras left out."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {
        canonicalize_name(r.name): r
        for r in parsed
        if r.marker is None or r.marker.evaluate({"extra": ""})
    }


def top_level_name(name: str) -> Check:
    """Whether `import kernels` and its like give our code, and whether that can be relied on."""
    module = name.split()[-1]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        return Check(name, "FAIL", "cannot be imported", "make setup")
    ours = ROOT / module / "__init__.py"
    found = Path(spec.origin).resolve()
    others = sorted({canonicalize_name(d) for d in _providers().get(module, [])} - {DISTRIBUTION})
    uninstall = f"pip uninstall {' '.join(others)}" if others else f"remove {found.parent}"
    if found != ours:
        advice = f"{uninstall}, or give TransXSSM an environment of its own (make setup)"
        return Check(name, "FAIL", f"another package comes first: {found.parent}", advice)
    if any(_installs(d, ours) for d in others):
        advice = f"{uninstall} and install TransXSSM again, in an environment of its own"
        return Check(name, "FAIL", f"shares its folder with {', '.join(others)}", advice)
    if others:
        advice = (
            "ours comes first here, which depends on the folder and the way Python is started: "
            f"{uninstall}, unless something else needs it"
        )
        return Check(name, "WARN", f"ours, but also in {', '.join(others)}", advice)
    return Check(name, "OK", f"ours ({ours.parent})")


@cache
def _providers() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def _installs(distribution: str, path: Path) -> bool:
    files = importlib.metadata.distribution(distribution).files or []
    return any(Path(str(f.locate())).resolve() == path for f in files if f.name == path.name)


# -- devices and compilers ----------------------------------------------------------------------


def devices(name: str) -> Check:
    import torch

    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = ", ".join(f"{p.name} {p.total_memory / GIB:.0f} GiB" for p in properties)
        if any(p.major < 8 for p in properties):
            return Check(name, "WARN", found, "bf16 needs Ampere or newer: --training.dtype fp32")
        return Check(name, "OK", found)
    if _has_nvidia_gpu():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        advice = "a newer driver, or a torch built for the one there is (nvidia-smi says which)"
        return Check(name, "FAIL", f"an NVIDIA GPU that torch ({build}) cannot use", advice)
    return Check(name, "OK", "no GPU: training runs on the CPU over gloo")


def _has_nvidia_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


def compiler(name: str) -> Check:
    """Triton compiles its launchers at run time, against Python's headers."""
    trouble: Status = "FAIL" if _has_nvidia_gpu() else "WARN"
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "cc", "clang"]
    path = next((p for p in map(shutil.which, wanted) if p), None)
    if path is None:
        advice = "Triton needs a C compiler on GPUs: apt-get install gcc, or set CC"
        return Check(name, trouble, f"none of {', '.join(wanted)}", advice)
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        advice = "Triton needs Python's headers on GPUs: apt-get install python3-dev"
        return Check(name, trouble, f"{path}, but no Python.h in {headers}", advice)
    return Check(name, "OK", path)


def nvcc(name: str) -> Check:
    return Check(name, "OK", shutil.which("nvcc") or "not found; optional, nothing here needs it")


# -- room ---------------------------------------------------------------------------------------


def current_folder(name: str) -> Check:
    advice = "a checkpoint takes 14 bytes a parameter: free some, or set logging.run_dir"
    return _room(name, Path.cwd(), 20, 1, advice)


def temporary_folder(name: str) -> Check:
    return _room(name, Path(tempfile.gettempdir()), 2, 0.1, "free some, or set TMPDIR")


def shared_memory(name: str) -> Check:
    if not SHARED_MEMORY.exists():
        return Check(name, "OK", f"no {SHARED_MEMORY} on this platform")
    advice = (
        "data loading and NCCL use it: remove what dead runs left there, "
        "or docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm"
    )
    return _room(name, SHARED_MEMORY, 1, 0.03, advice)


def _room(name: str, folder: Path, warn: float, fail: float, advice: str) -> Check:
    """Free space of a folder against two limits in GiB."""
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.2f} GiB free in {folder}"
    status: Status = "FAIL" if free < fail else "WARN" if free < warn else "OK"
    if status == "OK":
        return Check(name, status, found)
    return Check(name, status, f"{found}, less than {fail if free < fail else warn} GiB", advice)


def open_files(name: str) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 1024:
        return Check(name, "WARN", f"ulimit -n is {soft}", f"ulimit -n 65536 (hard limit: {hard})")
    return Check(name, "OK", f"ulimit -n is {'unlimited' if soft < 0 else soft}")


# -- network ------------------------------------------------------------------------------------


def loopback(name: str) -> Check:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.settimeout(0.5)
        client.connect(server.getsockname())
        return Check(name, "OK", "a socket on 127.0.0.1 binds and connects")


def host_name(name: str) -> Check:
    """gloo and torchrun look the host's own name up; a slow name server must not hold us."""
    host, answers = socket.gethostname(), list[str]()

    def resolve() -> None:
        try:
            answers.extend(str(a[4][0]) for a in socket.getaddrinfo(host, None))
        except OSError as error:
            answers.append(f"! {error}")

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(0.7)
    if answers and not answers[0].startswith("!"):
        return Check(name, "OK", f"{host} is {answers[0]}")
    advice = f"add '127.0.1.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME (one host: lo)"
    reason = answers[0].removeprefix("! ") if answers else "no answer in 0.7 s"
    return Check(name, "WARN", f"{host} does not resolve: {reason}", advice)


def interface(name: str) -> Check:
    """A backend's interface variable; NCCL's may hold prefixes, ^ and =, so it is only shown."""
    value = os.environ.get(name)
    if value is None:
        return Check(name, "OK", "not set; the interface is chosen automatically")
    present = [n for _, n in socket.if_nameindex()]
    missing = [n for n in value.split(",") if n not in present]
    if name.startswith("GLOO") and missing:
        advice = f"unset it, or use one of {', '.join(present)}"
        return Check(name, "FAIL", f"{value}: no such interface", advice)
    return Check(name, "OK", value)


CHECKS: list[tuple[str, Callable[[str], Check]]] = [
    ("python", python),
    (DISTRIBUTION, installed),
    *((name, package) for name in PACKAGES),
    *((f"import {name}", top_level_name) for name in MODULES),
    ("devices", devices),
    ("C compiler", compiler),
    ("nvcc", nvcc),
    ("current folder", current_folder),
    ("temporary folder", temporary_folder),
    ("shared memory", shared_memory),
    ("open files", open_files),
    ("loopback", loopback),
    ("host name", host_name),
    ("GLOO_SOCKET_IFNAME", interface),
    ("NCCL_SOCKET_IFNAME", interface),
]
