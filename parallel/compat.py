"""Megatron-core on hosts without CUDA, and the differences between its supported versions.

Megatron-core names the device "cuda" in a handful of factory calls (schedules, sequence-parallel
buffers). On a host without CUDA those calls are redirected to the CPU; everything else of it runs
over gloo unchanged.
"""

import ctypes
import importlib
import inspect
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MAX_MMAP_THRESHOLD = 32 << 20  # bytes; glibc returns larger buffers to the system in any case
RETIRED_ARGUMENTS = {"async_tensor_model_parallel_allreduce"}  # gone in Megatron-core 0.19


class _CudaFactoriesElsewhere(TorchFunctionMode):
    """Rewrites device="cuda" in factory calls to what stands in for the current CUDA device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs and (device := kwargs.get("device")) is not None and "cuda" in str(device):
            kwargs = kwargs | {"device": torch.cuda.current_device()}
        return func(*args, **(kwargs or {}))


def prepare_host(local_rank: int = 0) -> torch.device:
    """Make the engines usable on this host and return the device that this process trains on.

    With CUDA: selects the local rank's GPU, or the one that the launcher left visible. Without:
    tells DeepSpeed to use the CPU, keeps it from compiling its shared-memory collectives at first
    use, bounds the memory of oneDNN's compiled products, keeps the memory of one step for the next,
    and redirects Megatron-core's CUDA factory calls to the CPU. Idempotent.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
        return device
    os.environ["DS_ACCELERATOR"] = "cpu"
    # oneDNN reads it at its first product; its own default, 1,024, comes to a gigabyte in bf16
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    _keep_freed_memory()
    cpu = torch.device("cpu")
    if getattr(torch.cuda.current_device, "is_cpu_stand_in", False):
        return cpu

    def current_device() -> torch.device:
        return cpu

    current_device.is_cpu_stand_in = True  # type: ignore[attr-defined]
    torch.cuda.current_device = current_device  # type: ignore[assignment]
    # by name: the attribute `torch` of deepspeed.comm is the real torch
    setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    return cpu


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory, rather than return it to the system.

    The next step would map the memory of its activations again, page by page, which takes up to a
    tenth of the step's time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def factory_device(device: torch.device) -> Iterator[None]:
    """Megatron-core's buffers on `device`, for shapes without memory."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = before


@contextmanager
def gpu_stand_in(device: torch.device) -> Iterator[None]:
    """`device` in place of the GPU: for Megatron-core, DeepSpeed and torch's fused optimizers."""
    from deepspeed.accelerator import get_accelerator
    from torch.optim import optimizer

    accelerator, fused = get_accelerator(), optimizer._get_fused_kernels_supported_devices
    pretended: dict[str, Callable[..., Any]] = {
        "device_name": lambda index=None: device.type,
        "current_device_name": lambda: device.type,
        "on_accelerator": lambda tensor: tensor.device.type == device.type,
    }
    vars(accelerator).update(pretended)
    optimizer._get_fused_kernels_supported_devices = lambda: [*fused(), device.type]
    try:
        with factory_device(device):
            yield
    finally:
        optimizer._get_fused_kernels_supported_devices = fused
        for name in pretended:
            del vars(accelerator)[name]


def cuda_calls_on_cpu() -> TorchFunctionMode:
    """Context for calls into Megatron-core's schedules on a host without CUDA.

    Their factory calls go to the CPU, or to the device of `factory_device`.
    """
    return _CudaFactoriesElsewhere()


def without_retired(function: Callable[..., Any], **kwargs: Any) -> dict[str, Any]:
    """`kwargs` without those that newer versions of `function` no longer take."""
    known = inspect.signature(function).parameters
    return {k: v for k, v in kwargs.items() if k in known or k not in RETIRED_ARGUMENTS}
