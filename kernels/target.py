"""The GPU that Triton compiles for, as the tile tables and the shape of an algorithm need it."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    backend: str  # "cuda" or "hip"
    arch: int | str  # 80, 90, 100, ... or "gfx942"
    num_sms: int  # streaming multiprocessors, or compute units


INTERPRETED = Target("cuda", 90, 132)  # what Triton's interpreter stands for: an H100


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (decided before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def current_target() -> Target:
    """The target of the active Triton driver."""
    if interpreting():
        return INTERPRETED
    from triton.runtime import driver

    found = driver.active.get_current_target()
    return Target(found.backend, found.arch, _num_sms(found.backend, found.arch))


@lru_cache
def _num_sms(backend: str, arch: int | str) -> int:
    """Keyed by target: one process uses one kind of GPU (the audit pretends several)."""
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
    return int(properties["multiprocessor_count"])


def launch_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, where Triton looks for its target and launches.

    For forward passes; autograd itself does so around backward ones.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
