"""`transxssm pretrain --dry-run`: one rank of a job of any size, without the job.

The rank's stage is built on the meta device under a fake process group, and one micro-batch goes
forward and backward through each of its chunks: shapes and collectives are those of the real code;
nothing is allocated, sent or computed.
"""

import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.build import BuiltStage
from parallel.compat import factory_device
from parallel.context import LocalBatch
from parallel.groups import destroy_groups, init_groups
from parallel.memory import memory_by_stage
from parallel.split import layer_chunks
from parallel.topology import AXES, topology
from parallel.traffic import traffic
from pretrain.config import Config, ConfigError
from pretrain.console import whole_console
from pretrain.estimate import GIB, workload
from pretrain.layout import list_of_ranks
from pretrain.stage import configured_stage
from untrusted.numbers import counted


class Collectives(TorchDispatchMode):
    """Calls and bytes given to collectives, by group and kind."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names  # of groups
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_").removesuffix("_base")
            given = args[0] if name in ("send", "recv", "allreduce") else args[1]
            tensors = given if isinstance(given, list) else [given]
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            key = (self.names.get(_group_name(group), "?"), name)
            self.calls[key] += 1
            self.bytes[key] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def _group_name(group: Any) -> str:
    return str(dist.ProcessGroup.unbox(group).group_name)


def trace(config: Config, world_size: int, rank: int) -> tuple[BuiltStage, Collectives]:
    """A rank's stage on the meta device, and what one micro-batch through it communicates.

    Joins a fake job, and leaves it. Raises ConfigError for a rank or a layout that does not fit.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"--rank {rank} is none of --world-size {world_size}; use 0 to {world_size - 1}"
        )
    config.data_parallel(world_size)
    meta = torch.device("meta")
    if "meta" not in dist.Backend.backend_capability["fake"]:
        dist.Backend.backend_capability["fake"].append("meta")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        init_groups(config.parallel)
        names = {
            parallel_state.get_tensor_model_parallel_group().group_name: "tensor",
            parallel_state.get_context_parallel_group().group_name: "context",
        }
        seen = Collectives(names)
        with factory_device(meta), meta:
            built = configured_stage(config, meta)
            with seen:
                for chunk in built.chunks:
                    _micro_batch(config, chunk)
    finally:
        destroy_groups()
    return built, seen


def _micro_batch(config: Config, chunk: Any) -> None:
    """Forward and backward of a batch of whole-row documents."""
    work = workload(config, 1)
    rows, length = work.micro_batch_size, work.seq_len
    part = length // config.parallel.context
    ids = torch.zeros(rows, part, dtype=torch.int64)
    whole, parts = (torch.arange(rows + 1, dtype=torch.int32) * size for size in (length, part))
    batch = LocalBatch(ids, ids, torch.ones(rows, part), ids, whole, parts, ids[:, 0])
    if not chunk.first:
        tensor = config.parallel.tensor if config.parallel.sequence_parallel else 1
        shape = (rows * part // tensor, 1, config.model.hidden_size)
        chunk.set_input_tensor(
            torch.empty(shape, dtype=chunk.config.params_dtype, requires_grad=True)
        )
    out = chunk(
        batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens,
        batch.local_cu_seqlens,
    )  # fmt: skip
    out = out[0] if chunk.last else out  # the loss, without that of every token
    out.backward(torch.empty_like(out))


def dry_run(config: Config, world_size: int, rank: int, ranks_per_node: int) -> None:
    """Print what rank `rank` of `world_size` would hold and send. Raises ConfigError."""
    console = whole_console()
    begin = time.perf_counter()
    built, seen = trace(config, world_size, rank)
    model, parallel = config.model, config.parallel
    data = config.data_parallel(world_size)
    top = topology(parallel, data, ranks_per_node)
    place = top.coordinates(rank)
    console.print(
        f"rank {rank} of {world_size}, node {top.node(rank)}: "
        + ", ".join(f"{axis} {place[axis]} of {getattr(top, axis)}" for axis in AXES)
    )
    for axis in AXES:
        ranks = next(group for group in top.groups(axis) if rank in group)
        console.print(f"{axis} group: {list_of_ranks(ranks)}")
    table = Table("parameter", "shape here", "whole")
    for name, parameter in built.named_parameters():
        whole = built.infos[name].global_shape
        table.add_row(name, str(list(parameter.shape)), str(list(whole)))
    console.print(table)
    numel = sum(parameter.numel() for _, parameter in built.named_parameters())
    console.print(f"{counted(numel, 'parameter')} here, of {model.num_params()['total']:,}")
    work = workload(config, data)
    chunks = layer_chunks(model, parallel, max(config.seq_lens))
    memory = memory_by_stage(model, parallel, work, chunks)[place["pipeline"]]
    table = Table("memory", "GiB")
    for category, size in (memory.by_category() | {"peak": memory.peak}).items():
        if size:
            table.add_row(category, f"{size / GIB:,.3f}")
    console.print(table)
    table = Table("group", "collective", "calls a micro-batch", "MB given", "MB given a step")
    for (axis_name, kind), calls in sorted(seen.calls.items()):
        given = seen.bytes[axis_name, kind] / 1e6
        table.add_row(
            axis_name, kind, str(calls), f"{given:,.3f}", f"{given * work.micro_batches:,.1f}"
        )
    console.print(table)
    for axis, sent in traffic(model, parallel, work, place["pipeline"], chunks).items():
        console.print(f"{axis}: {sent / 1e9:,.3f} GB sent by this rank a step")
    console.print(f"built and traced in {time.perf_counter() - begin:.1f} s")
