"""The GPU that Triton compiles for, as the tile tables and the shape of an algorithm need it."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    backend: str  # "cuda" or "hip"
    arch: int | str  # 80, 90, 100, ... or "gfx942"
    num_sms: int  # streaming multiprocessors, or compute units


INTERPRETED = Target("cuda", 90, 132)  # what Triton's interpreter stands for: an H100


@cache
def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (decided before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def current_target() -> Target:
    """The target of the active Triton driver.

    Found once for a driver: one process uses one kind of GPU, and the audit, which pretends
    several, has a driver for each.
    """
    if interpreting():
        return INTERPRETED
    global _driver, _target
    active = _drivers().active
    if _driver is None or _driver() is not active:
        found = active.get_current_target()
        properties = active.utils.get_device_properties(active.get_current_device())
        target = Target(found.backend, found.arch, int(properties["multiprocessor_count"]))
        _driver, _target = ref(active), target
    assert _target is not None
    return _target


_driver: ref[Any] | None = None
_target: Target | None = None


@cache
def _drivers() -> Any:
    from triton.runtime import driver

    return driver


def launch_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, where Triton looks for its target and launches.

    For forward passes; autograd itself does so around backward ones.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
