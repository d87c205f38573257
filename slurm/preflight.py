"""Is every node fit, before a run of weeks begins? `transxssm preflight`, one task a GPU, seconds.

Every rank tells what is installed, what its GPU says of itself, and how fast its processor, memory,
disk and network are. Rank 0 compares: other installations than most are a failure, since they train
another model; a node that is slower than its peers by SLOW, or whose GPU reports faults, is named,
for the job script to leave it out. What all nodes suffer from, none of them is blamed for.
"""

import csv
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from parallel import self_check
from parallel.build import DTYPES
from parallel.compat import prepare_host
from parallel.groups import destroy_groups, host_group, init_distributed, init_groups
from parallel.launch import Launch, host_name
from parallel.peaks import best_seconds, product_peak
from pretrain import stop
from pretrain.config import Config
from pretrain.console import shown
from pretrain.run_dir import git_revision, package_versions
from untrusted.errors import UserError
from untrusted.files import write_durably
from untrusted.text import printable

BAD_NODES = 86
"""Exit code: nodes are named in RUN/preflight.json; start again without them."""
# Times the median. Hosts without GPUs share their processors with others, as GPUs do not.
SLOW_GPU, SLOW_CPU = 1.5, 5.0
CLOCK_SECONDS = 5.0  # apart; files' times are compared with clocks
JOIN = timedelta(minutes=3)
DISK_BYTES = 32 << 20
GPU_QUERY = (
    "index", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown",
    "memory.used",
)  # fmt: skip
GPU_MEMORY_USED = 2048  # MiB, of whom else?


class PreflightError(UserError):
    """The job cannot run on any of these nodes as they are."""


@dataclass(frozen=True)
class Report:
    """Of one rank."""

    rank: int
    host: str
    installed: dict[str, str]
    """What must be the same everywhere."""
    clock: float = 0.0
    speeds: dict[str, float] = field(default_factory=dict)
    """Larger is better; compared between ranks."""
    faults: list[str] = field(default_factory=list)
    """Bad in themselves."""
    paths: dict[str, str] = field(default_factory=dict)
    """Fast paths that failed their check on this rank's device, and why (parallel.self_check)."""


def preflight(config: Config, launch: Launch) -> dict[str, list[str]]:
    """Bad nodes and why, on every rank; rank 0 also writes RUN/preflight.json. A collective.

    Raises PreflightError on every rank.
    """
    device = prepare_host(launch.local_rank)
    init_distributed(launch, device, JOIN)
    init_groups(config.parallel)
    run_dir = Path(config.logging.run_dir)
    report = Report(launch.rank, host_name(), installed())
    reports = _gathered(report)
    refusal = _told(differences(reports) if reports else None)
    if refusal is None:
        paths, faults = _path_failures(config, device)
        dist.barrier(group=host_group())
        report = Report(
            launch.rank,
            report.host,
            report.installed,
            clock=time.time(),
            speeds=_speeds(device) | _disk(launch, run_dir) | _collectives(device),
            faults=faults + _gpu_faults(launch, device) + _space_faults(launch, config, run_dir),
            paths=paths,
        )
        reports = _gathered(report)
        for line in unusable_paths(reports):
            print(shown(f"preflight: {line}"), file=sys.stderr)
        slow = SLOW_GPU if device.type == "cuda" else SLOW_CPU
        found = _told(bad_nodes(reports, slow) if reports else None) or {}
        if reports:
            _write(run_dir, reports, found)
        if found and len(found) == _told(len({r.host for r in reports}) if reports else None):
            refusal = "every node is unfit: " + in_words(found)
    # srun ends the other ranks with the first that exits, and takes the largest exit code: 143 then
    stop.outlive_signals()
    dist.barrier(group=host_group())
    destroy_groups()
    if refusal is not None:
        raise PreflightError(refusal)
    return found


def in_words(found: dict[str, list[str]]) -> str:
    """Nodes and their faults, a line."""
    return "; ".join(f"{host}: {', '.join(faults)}" for host, faults in sorted(found.items()))


def _gathered(report: Report) -> list[Report]:
    """Of all ranks, on rank 0."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(report, found, dst=0, group=host_group())
    return found or []


def _told(mine: Any) -> Any:
    """What rank 0 has to say."""
    said = [mine]
    dist.broadcast_object_list(said, src=0, group=host_group())
    return said[0]


def _write(run_dir: Path, reports: list[Report], found: dict[str, list[str]]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    content = {"bad_nodes": found, "ranks": [asdict(report) for report in reports]}
    write_durably(run_dir / "preflight.json", json.dumps(content, indent=1).encode())


# -- what rank 0 makes of it -----------------------------------------------------------------------


def differences(reports: list[Report]) -> str | None:
    """What is installed differently, and where; None if nothing is."""
    said = []
    for name in sorted({name for report in reports for name in report.installed}):
        hosts: dict[str, set[str]] = defaultdict(set)
        for report in reports:
            hosts[report.installed.get(name, "absent")].add(report.host)
        if len(hosts) > 1:
            places = (f"{value} on {_some(names)}" for value, names in sorted(hosts.items()))
            said.append(f"{name}: {', '.join(places)}")
    if not said:
        return None
    return f"nodes have different installations: {'; '.join(said)}; install the same everywhere"


def _some(names: set[str]) -> str:
    few = sorted(names)[:4]
    return ", ".join(few) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def bad_nodes(reports: list[Report], slow: float) -> dict[str, list[str]]:
    """Hosts with faults of their own, or `slow` times slower than the median rank in something."""
    found: dict[str, list[str]] = defaultdict(list)
    clock = statistics.median(report.clock for report in reports)
    for report in reports:
        found[report.host] += report.faults
        if abs(report.clock - clock) > CLOCK_SECONDS:
            found[report.host].append(f"its clock is {report.clock - clock:+.0f} s off")
    for name in {name for report in reports for name in report.speeds}:
        having = [report for report in reports if name in report.speeds]
        usual = statistics.median(report.speeds[name] for report in having)
        for report in having:
            if report.speeds[name] * slow < usual:
                said = f"{name} {report.speeds[name]:.3g}, usually {usual:.3g}"
                found[report.host].append(f"rank {report.rank}: {said}")
    systematic = _systematic(reports)
    for report in reports:
        for path, reason in report.paths.items():
            if path not in systematic:
                found[report.host].append(f"rank {report.rank}: {path}: {reason}")
    return {host: faults for host, faults in found.items() if faults}


def unusable_paths(reports: list[Report]) -> list[str]:
    """What training will do without fast paths that fail on most ranks, a line a path."""
    return [self_check.in_words(path, reason) for path, reason in _systematic(reports).items()]


def _systematic(reports: list[Report]) -> dict[str, str]:
    """Paths that fail on at least half of the ranks, so that no node is to blame, and why."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        for path, reason in report.paths.items():
            reasons[path].append(f"rank {report.rank}: {reason}")
    return {path: found[0] for path, found in reasons.items() if 2 * len(found) >= len(reports)}


# -- what every rank finds -------------------------------------------------------------------------


def installed() -> dict[str, str]:
    """Versions, and a digest of this program's source files: an edit on one node counts."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in (
        "pretrain",
        "parallel",
        "kernels",
        "data_pipeline",
        "checkpoints_tools",
        "slurm",
        "untrusted",
    ):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    found = {"python": platform.python_version(), "source": digest.hexdigest()[:12]}
    return found | {"revision": git_revision()[:12]} | package_versions()


def _path_failures(config: Config, device: torch.device) -> tuple[dict[str, str], list[str]]:
    """Fast paths that fail on this rank's device, and faults for which nothing can run instead."""
    dtype = DTYPES[config.training.dtype]
    try:
        return self_check.failures(config.model, device, dtype), []
    except self_check.SelfCheckError as error:
        return {}, [str(error)]


def _speeds(device: torch.device) -> dict[str, float]:
    """Of a matrix product (TFLOP/s) and of copying memory (GB/s), the best of some tries."""
    source = torch.ones((1 << 28) if device.type == "cuda" else (1 << 22), device=device)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device)
    return {
        "matrix product TFLOP/s": product_peak(device) / 1e12,
        "memory GB/s": 2 * source.nbytes / copy / 1e9,
    }


def _collectives(device: torch.device) -> dict[str, float]:
    """GB/s of an all-reduce along each axis. Raises PreflightError where its sum is wrong."""
    axes = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    found = {}
    for axis, group in axes.items():
        if (size := group.size()) == 1:
            continue
        mine = float(group.rank() + 1)
        numbers = torch.empty((1 << 26) if device.type == "cuda" else (1 << 18), device=device)

        def reduce(numbers: torch.Tensor = numbers, mine: float = mine, group: Any = group) -> None:
            numbers.fill_(mine)
            dist.all_reduce(numbers, group=group)

        found[f"all-reduce over {axis} ranks GB/s"] = (
            numbers.nbytes / best_seconds(reduce, device) / 1e9
        )
        if not bool((numbers == size * (size + 1) / 2).all()):
            raise PreflightError(
                f"an all-reduce over the {size} {axis}-parallel ranks of rank {dist.get_rank()} on "
                f"{host_name()} gives a wrong sum"
            )
    return found


def _disk(launch: Launch, run_dir: Path) -> dict[str, float]:
    """MB/s of writing to the run directory, of one rank a node."""
    if launch.local_rank:
        return {}
    run_dir.mkdir(parents=True, exist_ok=True)
    path, content = run_dir / f".preflight-{launch.rank}", os.urandom(DISK_BYTES)
    begin = time.perf_counter()
    try:
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return {"run directory MB/s": DISK_BYTES / (time.perf_counter() - begin) / 1e6}


def _space_faults(launch: Launch, config: Config, run_dir: Path) -> list[str]:
    """Of one rank a node: room for the checkpoints that are kept, and one more."""
    if launch.local_rank:
        return []
    size = 12 * config.model.num_params()["total"]  # float32 weights and both moments
    wanted = size * (config.checkpoint.keep_last + 1)
    there = config.checkpoint_dir if config.checkpoint_dir.exists() else run_dir
    free = shutil.disk_usage(there).free
    held = sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
    if free + held < wanted:
        return [f"{free / 1e9:.1f} GB free for checkpoints that take {wanted / 1e9:.1f} GB"]
    return []


def _gpu_faults(launch: Launch, device: torch.device) -> list[str]:
    """What this rank's GPU says of itself."""
    if device.type != "cuda":
        return []
    words = ["nvidia-smi", f"--id={launch.local_rank}", f"--query-gpu={','.join(GPU_QUERY)}"]
    try:
        done = subprocess.run(
            [*words, "--format=csv,noheader,nounits"],
            capture_output=True, encoding="utf-8", errors="replace", timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi: {error}"]
    if done.returncode:
        return [f"nvidia-smi: {(done.stderr or done.stdout).strip()}"]
    return gpu_faults(done.stdout)


def gpu_faults(text: str) -> list[str]:
    """Of lines of GPU_QUERY."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        values = next(csv.reader([line], skipinitialspace=True))
        if len(values) != len(GPU_QUERY):
            found.append(f"nvidia-smi: {printable(line)[:200]}")
            continue
        index, errors, slowdown, used = values
        if errors.isdecimal() and int(errors):
            found.append(f"GPU {index}: {errors} memory errors that could not be corrected")
        if slowdown == "Active":
            found.append(f"GPU {index}: slowed down by the hardware (heat or power)")
        if used.isdecimal() and int(used) > GPU_MEMORY_USED:
            found.append(f"GPU {index}: {used} MiB in use, before the job has begun")
    return found


def run(config: Config, launch: Launch) -> int:
    """Print the outcome on rank 0; the exit code."""
    begin = time.perf_counter()
    found = preflight(config, launch)
    if launch.rank == 0:
        seconds = f"{time.perf_counter() - begin:.1f} s"
        if found:
            print(shown(f"preflight, {seconds}: bad nodes: {in_words(found)}"), file=sys.stderr)
        else:
            print(f"preflight, {seconds}: every node is fit", file=sys.stderr)
    return BAD_NODES if found else 0
