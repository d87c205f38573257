"""Process groups: joining the job and Megatron-core's groups.

Rank order is Megatron's: tensor varies fastest, then context, data and pipeline, so that
tensor-parallel peers are neighbours on a node and pipeline stages are far apart.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from parallel.config import ParallelConfig
from parallel.launch import Launch
from parallel.rendezvous import cannot_meet, join_store, reported_if_slow
from untrusted.errors import transferable

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def from_rank_0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone; return its result, or raise its exception, on every rank.

    For decisions that depend on the file system, which nodes may see differently.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = transferable(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def init_distributed(
    launch: Launch, device: torch.device, timeout: timedelta = COLLECTIVE_TIMEOUT
) -> None:
    """Join the job's process group: NCCL on GPUs, gloo on CPUs. One process needs no address.

    Raises LaunchError.
    """
    if dist.is_initialized():
        return
    with reported_if_slow(launch) if launch.world_size > 1 else nullcontext():
        _join(launch, device, timeout)


def _join(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    store = join_store(launch, timeout)
    env = os.environ
    # DeepSpeed reads these itself
    env["RANK"], env["WORLD_SIZE"] = str(launch.rank), str(launch.world_size)
    env["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed selects this device once more
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise cannot_meet(error, launch) from error


def init_groups(config: ParallelConfig) -> None:
    """Create Megatron-core's groups for this layout; the world must already be joined."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline_size(config),
            context_parallel_size=config.context,
            create_gloo_process_groups=False,
        )


_host_group: dist.ProcessGroup | None = None


def host_group() -> dist.ProcessGroup:
    """All ranks over gloo, for what lies on hosts, whatever trains. Made in the first call, which
    is a collective."""
    global _host_group
    if _host_group is None:
        # connects ranks when they first talk: else each one to all others, thousands of sockets
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _host_group = group
    return _host_group


def largest_of_all(value: int) -> int:
    """Over all ranks, without a word to the device. A collective."""
    found = torch.tensor(value)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=host_group())
    return int(found)


def virtual_pipeline_size(config: ParallelConfig) -> int | None:
    """Chunks a stage, or None: any number makes Megatron-core interleave."""
    return config.virtual_pipeline if config.virtual_pipeline > 1 else None


def destroy_groups() -> None:
    """Leave all groups and the job."""
    global _host_group
    _host_group = None
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def replicas_group() -> dist.ProcessGroup:
    """The ranks that hold the same parameters: data × context."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def group_of_this_rank() -> dist.ProcessGroup:
    """A group of one."""
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


class MpuAdapter:
    """Megatron-core's parallel state under the names that DeepSpeed calls.

    DeepSpeed takes "model parallel" as everything that is not data parallel and "tensor model
    parallel" as the tensor axis. `shards`: the group that ZeRO shards over.
    """

    def __init__(self, shards: dist.ProcessGroup) -> None:
        self.shards = shards

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters, as far as DeepSpeed is to know."""
        return self.shards

    def get_data_parallel_rank(self) -> int:
        """Rank inside that group."""
        return self.shards.rank()

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return self.shards.size()

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_pipeline_model_parallel_group = staticmethod(
        parallel_state.get_pipeline_model_parallel_group
    )
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(
        parallel_state.get_pipeline_model_parallel_world_size
    )

    @staticmethod
    def get_model_parallel_rank() -> int:
        """Rank inside the model-parallel group (tensor × pipeline)."""
        return dist.get_rank(group=parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Size of the model-parallel group (tensor × pipeline)."""
        return dist.get_world_size(group=parallel_state.get_model_parallel_group())
