"""Name the Triton kernels that a GPU would launch, without compiling them.

    with record_only(TARGETS["sm_90"], lambda launch: print(launch.name, launch.bytes)):
        y = ssd(x, ...)                                  # tensors on the meta device: no memory

The launch code is the real one; what `kernels.audit.compiling` compiles is only listed here.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from triton.runtime.driver import driver as drivers
from triton.runtime.jit import JITFunction

from kernels.audit.compiling import forced, pretended_driver
from kernels.target import Target, interpreting


@dataclass(frozen=True)
class Recorded:
    """One launch. bytes: every tensor argument as often as the kernel's own text loads or stores
    it, and once where only what it calls does; programs that read the same bytes count as one.
    """

    name: str
    bytes: int


@contextlib.contextmanager
def record_only(target: Target, launched: Callable[[Recorded], None]) -> Iterator[None]:
    """Within it, Triton kernels of this process are reported to `launched` and do nothing.

    Operations choose Triton whatever their tensors' device, and see `target`.

    Raises RuntimeError under TRITON_INTERPRET.
    """
    if interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels would be interpreted, not launched; unset it before"
            " Python starts"
        )

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launched(Recorded(kernel.__name__, _bytes(kernel, given)))

    before, stock = drivers._active, JITFunction.run
    with forced("triton"):
        drivers.set_active(pretended_driver(target))
        JITFunction.run = run
        try:
            yield
        finally:
            JITFunction.run, drivers._active = stock, before


def _bytes(kernel: Any, arguments: dict[str, Any]) -> int:
    times = _accesses(kernel.src)
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    return sum(distinct_bytes(t) * max(1, times[name]) for name, t in tensors.items())


@cache
def _accesses(source: str) -> Counter[str]:
    """How often a kernel's own text loads from or stores to a pointer."""
    return Counter(re.findall(r"tl\.(?:load|store)\(\s*(\w+)", source))


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes in memory behind a tensor; a dimension that it was expanded along counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 and size > 0 else size
    return elements * tensor.element_size()
