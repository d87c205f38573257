"""Which implementation of an operation runs: Triton on GPUs, torch elsewhere.

TRANSXSSM_KERNELS=torch|triton|naive forces one for every operation; `triton` on a CPU needs
Triton's interpreter (TRITON_INTERPRET=1), `naive` is the float64 oracle. TRANSXSSM_STRICT=1 is
strict mode: a call that Triton cannot serve raises instead of falling back to torch, and values on
the device (cu_seqlens, NaN in A) are checked, which waits for the device.
"""

import logging
import os
from typing import Literal

import torch

from kernels.errors import KernelsError
from kernels.paths import is_off
from kernels.target import interpreting

Choice = Literal["triton", "torch", "naive"]

_logger = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()
chosen: dict[str, set[str]] = {}
"""What has run so far, of every operation."""


def strict() -> bool:
    """Whether strict mode is on."""
    return os.environ.get("TRANSXSSM_STRICT", "0") not in ("0", "")


def check_environment() -> None:
    """Raise KernelsError where TRANSXSSM_KERNELS or TRANSXSSM_TILES is bad: before any work."""
    _forced()
    if os.environ.get("TRANSXSSM_TILES"):
        from kernels.ssd.tiles import tuned_tiles  # imports Triton

        tuned_tiles()


@torch.compiler.assume_constant_result
def choose(op: str, device: torch.device, unsupported: str | None) -> Choice:
    """The implementation of `op` for tensors on `device`, which `chosen` remembers.

    unsupported: why Triton cannot serve this call, or None when it can.

    Raises KernelsError for an unknown TRANSXSSM_KERNELS, for `triton` where no Triton kernel can
    run, and in strict mode for an unsupported call.
    """
    choice = _choose(op, device, unsupported)
    chosen.setdefault(op, set()).add(choice)
    return choice


def runs_triton(device: torch.device) -> bool:
    """Whether operations that Triton can serve run in Triton for tensors on `device`."""
    forced = _forced()
    return forced == "triton" or (not forced and device.type == "cuda")


def _choose(op: str, device: torch.device, unsupported: str | None) -> Choice:
    forced = _forced()
    if forced == "naive":
        return "naive"
    if not runs_triton(device):
        return "torch"
    if device.type == "cpu" and not interpreting():
        raise KernelsError(
            "TRANSXSSM_KERNELS=triton, but the tensors are on the CPU: to interpret the kernels,"
            " set TRITON_INTERPRET=1 before Python starts; else set TRANSXSSM_KERNELS=torch"
        )
    if unsupported is None:
        return "torch" if is_off(op) else "triton"
    if strict():
        raise KernelsError(
            f"{op}: {unsupported} (strict mode; without it, torch would run this call)"
        )
    if (op, unsupported) not in _warned:
        _warned.add((op, unsupported))
        _logger.warning("%s: %s; torch runs it instead of Triton", op, unsupported)
    return "torch"


def _forced() -> str:
    forced = os.environ.get("TRANSXSSM_KERNELS", "")
    if forced not in ("", "torch", "triton", "naive"):
        raise KernelsError(
            f"TRANSXSSM_KERNELS={forced!r}; expected torch, triton or naive (or leave it unset)"
        )
    return forced
