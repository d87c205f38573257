"""Compile Triton kernels for a GPU that is not there, through the code that launches them.

    with compile_only(TARGETS["sm_90"]) as launches:
        y = ssd(x, ...)                                  # tensors on the meta device: no memory
        torch.autograd.grad(y, x, torch.empty_like(y))

Argument types, alignment, grid and tile choices are those of a real run, because the launch code is
the real one; a driver that compiles and launches nothing stands in for the GPU's.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as drivers

from kernels.target import Target, interpreting

# A100, H100, B200 (SXM) and MI300X by the number of their multiprocessors.
TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "gfx942": Target("hip", "gfx942", 304),
}
# More than any kernel asks for: a kernel over its GPU's limit is to be reported, not raised.
_UNLIMITED_SHARED = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One launch that a GPU would have run."""

    kernel: Any  # triton's CompiledKernel
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # by parameter name; constexpr parameters too
    compiler_log: str  # what ptxas -v said; "" for AMD
    compile_seconds: float


def available_targets() -> list[str]:
    """Names of TARGETS that the installed Triton has a backend for."""
    return [name for name, target in TARGETS.items() if _supported(target)]


def _supported(target: Target) -> bool:
    return any(b.compiler.supports_target(_gpu(target)) for b in triton.backends.backends.values())


def _gpu(target: Target) -> GPUTarget:
    return GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)


@contextlib.contextmanager
def compile_only(target: Target) -> Iterator[list[Launch]]:
    """Within it, Triton kernels of this process compile for `target`; launches are only listed.

    Operations choose Triton whatever their tensors' device. Triton's cache is left alone.

    Raises RuntimeError under TRITON_INTERPRET, and when Triton has no backend for `target`.
    """
    if interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it before"
            " Python starts"
        )
    if not _supported(target):
        raise RuntimeError(
            f"this Triton ({triton.__version__}) has no backend for {target.backend}:{target.arch}"
        )
    launches: list[Launch] = []
    pretended = _Driver(target, launches)
    knobs, before = triton.knobs, drivers._active
    with (
        forced("triton"),
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        tempfile.TemporaryDirectory() as cache,
    ):
        knobs.cache.dir = cache  # a cached kernel would come without its log
        knobs.compilation.listener = pretended.compiled
        knobs.nvidia.dump_ptxas_log = True
        drivers.set_active(pretended)
        try:
            with contextlib.redirect_stdout(pretended.output):
                yield launches
        finally:
            drivers._active = before
            for launch in launches:  # or its kernels would live as long as the function
                launch.kernel.src.fn.device_caches.pop(pretended, None)


@contextlib.contextmanager
def forced(choice: str) -> Iterator[None]:
    """Within it, TRANSXSSM_KERNELS is `choice`."""
    before = os.environ.get("TRANSXSSM_KERNELS")
    os.environ["TRANSXSSM_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRANSXSSM_KERNELS"]
        else:
            os.environ["TRANSXSSM_KERNELS"] = before


def pretended_driver(target: Target) -> DriverBase:
    """A driver that knows its target and launches nothing."""
    return _Driver(target, [])


class _Driver(DriverBase):
    """What Triton's runtime asks of a driver to compile and launch."""

    def __init__(self, target: Target, launches: list[Launch]) -> None:
        self.target = target
        self.launches = launches
        self.output = io.StringIO()  # Triton prints what ptxas says
        self.logs: dict[str, tuple[str, float]] = {}  # by hash: log, seconds
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = source.fn.arg_names

        def launch(x: int, y: int, z: int, *args: Any) -> None:
            # stream, function, packed metadata, launch metadata and two hooks precede the arguments
            arguments = dict(zip(names, args[6:], strict=True))
            kernels = source.fn.device_caches[self][0].values()
            kernel = next(k for k in kernels if k.hash == metadata.hash)
            self.launches.append(Launch(kernel, (x, y, z), arguments, *self.logs[kernel.hash]))

        return launch

    def compiled(self, *, metadata: dict[str, Any], times: Any, **_: Any) -> None:
        said = self.output.getvalue()
        self.output.seek(0)
        self.output.truncate()
        self.logs[metadata["hash"]] = (said, times.total / 1e6)

    def get_current_device(self) -> "_Driver":
        # Triton keys compiled kernels and device properties by device: a driver shares none
        return self

    def get_current_target(self) -> GPUTarget:
        return _gpu(self.target)

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {
            "max_shared_mem": _UNLIMITED_SHARED,
            "multiprocessor_count": self.target.num_sms,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        # module (None: nothing to unload), function, registers, spills, most threads of a program
        return None, None, 0, 0, 1024

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed here: give the kernel one configuration")
