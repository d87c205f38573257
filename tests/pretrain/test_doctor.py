"""The doctor's verdicts on machines that have something wrong."""

import importlib
import shutil
import socket
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import doctor as doctor_module
from pretrain.doctor import CHECKS, Check, doctor, run_check

Usage = namedtuple("Usage", "total used free")
GIB = 2**30


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    doctor_module._requirements.cache_clear()
    doctor_module._providers.cache_clear()
    yield
    doctor_module._requirements.cache_clear()
    doctor_module._providers.cache_clear()


def check(name: str) -> Check:
    return run_check(name, dict(CHECKS)[name])


def add_distribution(
    folder: Path, name: str, version: str, *, module: str = "", metadata: str = ""
) -> None:
    """A distribution in `folder`, as pip leaves it, that installs the package `module`."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}"
    )
    if module:
        (folder / module).mkdir(exist_ok=True)
        (folder / module / "__init__.py").touch()
        (info / "RECORD").write_text(f"{module}/__init__.py,,\n")
        (info / "top_level.txt").write_text(f"{module}\n")


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the path and holds our metadata, with bounds on two packages."""
    requires = [
        "torch>=2.9",
        "webdataset>=1.0,<2",
        "triton>=3.5; platform_system == 'Plan9'",
        "tokenizers; extra == 'dev'",
    ]
    metadata = "Requires-Python: >=3.11\n" + "".join(f"Requires-Dist: {r}\n" for r in requires)
    add_distribution(tmp_path, "transxssm", "0.1.0", metadata=metadata)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def forget(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As in a process that has not imported `module`; it is back after the test."""
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()


# -- packages -----------------------------------------------------------------------------------


def test_version_outside_the_bounds_fails_and_names_both(wanted: Path) -> None:
    add_distribution(wanted, "torch", "2.8.1+cu128")
    assert check("torch") == Check(
        "torch", "FAIL", "2.8.1+cu128, wanted >=2.9", "pip install 'torch>=2.9'"
    )


@pytest.mark.parametrize("version", ["2.9.0", "2.14.1+cu130", "3.0.0a0+git123"])
def test_local_and_development_builds_are_inside_the_bounds(wanted: Path, version: str) -> None:
    add_distribution(wanted, "torch", version)
    assert check("torch").status == "OK"


def test_missing_package_fails_with_the_command_that_installs_it(
    wanted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(wanted)])
    found = check("webdataset")
    assert (found.status, found.found) == ("FAIL", "not installed")
    assert "pip install 'webdataset<2,>=1.0'" in found.advice


def test_package_of_another_platform_is_not_missed(
    wanted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(wanted)])
    assert check("triton").status == "OK"


def test_project_without_metadata_fails_and_says_make_setup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert check("transxssm") == Check(
        "transxssm", "FAIL", "not installed in this environment", "make setup"
    )


def test_python_outside_the_bounds_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_distribution(tmp_path, "transxssm", "0.1.0", metadata="Requires-Python: >=4\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert check("python").status == "FAIL"


# -- name clashes -------------------------------------------------------------------------------


def test_another_kernels_package_that_comes_first_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_distribution(tmp_path, "kernels", "0.9.0", module="kernels")
    forget(monkeypatch, "kernels")
    monkeypatch.syspath_prepend(tmp_path)
    found = check("import kernels")
    assert found.status == "FAIL"
    assert str(tmp_path / "kernels") in found.found
    assert "pip uninstall kernels" in found.advice


def test_another_kernels_package_behind_ours_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_distribution(tmp_path, "kernels", "0.9.0", module="kernels")
    forget(monkeypatch, "kernels")
    monkeypatch.setattr(sys, "path", [str(doctor_module.ROOT), *sys.path, str(tmp_path)])
    found = check("import kernels")
    assert (found.status, found.found) == ("WARN", "ours, but also in kernels")
    assert "pip uninstall kernels" in found.advice


def test_another_package_installed_into_our_folder_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_distribution(tmp_path, "kernels", "0.9.0", module="kernels")
    forget(monkeypatch, "kernels")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor_module, "ROOT", tmp_path.resolve())
    found = check("import kernels")
    assert (found.status, found.found) == ("FAIL", "shares its folder with kernels")


@pytest.mark.parametrize("name", doctor_module.MODULES)
def test_our_own_packages_are_found_to_be_ours(name: str) -> None:
    assert check(f"import {name}").found.startswith("ours")


# -- the machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "status"), [(8 * GIB, "OK"), (GIB // 2, "WARN"), (GIB // 64, "FAIL")]
)
def test_little_shared_memory_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, status: str
) -> None:
    monkeypatch.setattr(doctor_module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 * GIB, 64 * GIB - free, free))
    found = check("shared memory")
    assert found.status == status
    assert ("--shm-size" in found.advice) == (status != "OK")


@pytest.mark.parametrize("gpu", [False, True])
def test_missing_compiler_fails_where_triton_needs_it(
    monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor_module, "_has_nvidia_gpu", lambda: gpu)
    found = check("C compiler")
    assert found.status == ("FAIL" if gpu else "WARN")
    assert "apt-get install gcc" in found.advice


def test_gloo_interface_that_does_not_exist_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    found = check("GLOO_SOCKET_IFNAME")
    assert (found.status, found.found) == ("FAIL", "nosuch0: no such interface")


def test_slow_name_server_does_not_hold_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> list[object]:
        time.sleep(2)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    start = time.monotonic()
    assert check("host name").status == "WARN"
    assert time.monotonic() - start < 1.5


# -- the whole ----------------------------------------------------------------------------------


def broken(name: str) -> Check:
    raise RuntimeError("driver gone")


def fine(name: str) -> Check:
    return Check(name, "OK", "there")


def doubtful(name: str) -> Check:
    return Check(name, "WARN", "little", "get more")


def test_crash_in_a_check_is_a_failure_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_module, "CHECKS", [("driver", broken), ("thing", fine)])
    assert doctor() == 1
    out = capsys.readouterr().out
    assert "FAIL driver" in out
    assert "RuntimeError: driver gone" in out
    assert "OK   thing" in out


def test_warnings_say_what_to_do_and_do_not_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_module, "CHECKS", [("thing", fine), ("room", doubtful)])
    assert doctor() == 0
    out = capsys.readouterr().out
    assert "WARN room" in out
    assert "→ get more" in out


def test_every_check_runs_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    doctor()
    out = capsys.readouterr().out
    assert "could not run" not in out
    assert all(name in out for name, _ in CHECKS)
