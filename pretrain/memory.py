"""Whether a run can fit its machine, before anything is allocated.

Refused is what certainly cannot fit: parameters, master weights, moments and one row of hidden
states of a micro-batch, against all the memory that there is, swap included. What a step needs in
addition is the estimate's business (`transxssm estimate`).
"""

import resource
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.launch import Launch, host_name
from parallel.memory import memory_by_stage
from parallel.split import layer_chunks
from pretrain.config import Config, ConfigError
from pretrain.estimate import GIB, workload

CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # bytes; cgroups of the first version write about 2⁶³ where there is none
# Addresses that threads to come reserve; torch and gloo abort where they get none. From 3.7 GiB
# after imports, a run of a tiny model needed 0.6 GiB more
THREADS_SPACE = 512 << 20


@dataclass(frozen=True)
class Need:
    """Bytes that one rank cannot do without, on the device that it trains on and on its host."""

    device: int
    host: int


@dataclass(frozen=True)
class Limit:
    """Bytes that may be taken by all ranks of this job that name the same `place`."""

    place: str
    bytes: int
    advice: str


def least_need(config: Config, data_parallel: int, on_gpu: bool) -> Need:
    """Of the fullest rank of the job."""
    model, parallel = config.model, config.parallel
    work = workload(config, data_parallel)
    chunks = layer_chunks(model, parallel, max(config.seq_lens))
    stages = memory_by_stage(model, parallel, work, chunks)
    hidden = work.tokens(parallel) * model.hidden_size * work.itemsize
    hidden //= parallel.tensor if parallel.sequence_parallel else 1
    device = max(stage.weights + stage.master + stage.moments for stage in stages) + hidden
    host = max(stage.host for stage in stages)
    return Need(device, host) if on_gpu else Need(0, device + host)


def refuse_too_large(config: Config, launch: Launch, device: torch.device) -> None:
    """Compare what every rank needs with its machine. Collective.

    Raises ConfigError on every rank when one of them cannot fit.
    """
    need = least_need(config, config.data_parallel(launch.world_size), device.type == "cuda")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        on_device = [Limit(f"rank {launch.rank}'s {device} on {host_name()}", total, "")]
    else:
        on_device = []
    mine = [(need.device, limit) for limit in on_device]
    mine += [(need.host, limit) for limit in host_limits(launch.rank)]
    every: list[list[tuple[int, Limit]]] = [mine]
    if launch.world_size > 1:
        every = [[] for _ in range(launch.world_size)]
        dist.all_gather_object(every, mine)
    by_place: dict[str, tuple[int, int, Limit]] = {}  # bytes needed, ranks, the tightest limit
    for needed, limit in (pair for pairs in every for pair in pairs):
        before = by_place.get(limit.place, (0, 0, limit))
        tightest = min(before[2], limit, key=lambda known: known.bytes)
        by_place[limit.place] = (before[0] + needed, before[1] + 1, tightest)
    for needed, ranks, limit in by_place.values():
        if needed > limit.bytes:
            raise ConfigError(_refusal(config, needed, ranks, limit))


def _refusal(config: Config, needed: int, ranks: int, limit: Limit) -> str:
    who = f"{ranks} ranks need" if ranks > 1 else "a rank needs"
    return (
        f"{who} {needed / GIB:,.2f} GiB at least, for {config.model.num_params()['total']:,} "
        f"parameters with their optimizer state and a micro-batch of "
        f"{config.training.micro_batch_size} × {config.data.seq_len} tokens, and {limit.place} has "
        f"{limit.bytes / GIB:,.2f} GiB; use a smaller [model] or training.micro_batch_size, more "
        f"nodes with parallel.zero_stage=1, or a larger parallel.tensor or parallel.pipeline"
        f"{limit.advice}"
    )


def host_limits(rank: int) -> list[Limit]:
    """What bounds this process's memory: the machine, its control group, and `ulimit -v`."""
    host = host_name()
    limits = [Limit(f"the host {host} (memory and swap)", _of_machine("MemTotal", "SwapTotal"), "")]
    for place, most in _cgroup_limits():
        advice = ", or ask for more memory for the job"
        limits.append(Limit(f"the control group {place} on {host}", most, advice))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        advice = ", or raise ulimit -v"
        left = max(0, soft - used - THREADS_SPACE)
        limits.append(Limit(f"rank {rank} within its ulimit -v still", left, advice))
    return limits


def _cgroup_limits() -> list[tuple[str, int]]:
    """(path, bytes, swap included) of this process's control group and those around it."""
    try:
        entries = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers == "":
            names, root = ["memory.max", "memory.swap.max"], CGROUPS
        elif "memory" in controllers.split(","):
            names, root = ["memory.limit_in_bytes"], CGROUPS / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        for place in [folder, *folder.parents]:
            sizes = [_bytes_in(place / name) for name in names]
            if sizes[0] is not None:
                # swap without a bound of its own, or beside a first version's: as much as there is
                most = sizes[0] + (
                    sizes[1] if sizes[1:] and sizes[1] is not None else _of_machine("SwapTotal")
                )
                found.append((str(place), most))
            if place == root:
                break
    return found


def _of_machine(*names: str) -> int:
    """Bytes that /proc/meminfo has under these names, together."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(sizes[name].split()[0]) for name in names)


def _bytes_in(file: Path) -> int | None:
    """A limit's bytes, or None where there is none."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() and int(text) < NO_LIMIT else None
