"""A fast path that fails in a process, as on a GPU that cannot run it."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kernels.paths import is_off
from parallel import self_check


def fail_first_path(nothing_instead: bool = False) -> None:
    """Make the first check fail here, for good, perhaps with what is to run instead."""

    def compute(inputs: self_check.Inputs) -> Sequence[Tensor]:
        if nothing_instead or not is_off(first.path):
            raise RuntimeError("no such kernel")
        return []

    first = replace(self_check.CHECKS[0], is_taken=lambda _: True, compute=compute)
    self_check.CHECKS[0] = first
