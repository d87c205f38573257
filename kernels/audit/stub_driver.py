"""Triton's own launcher without a GPU, over a CUDA driver library that does nothing.

What the host does for a launch is real: binding arguments, looking the kernel up, Triton's launcher
in C. Kernels compile as for a GPU and never run. The library and the launcher are compiled when
they are asked for; the process must not use a GPU beside it.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as drivers

from kernels.target import Target

# Every function of the driver that Triton's launcher and utilities name.
_RETURNING_SUCCESS = (
    "cuCtxGetDevice", "cuCtxGetLimit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuDeviceGet",
    "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDriverGetVersion", "cuFuncGetAttribute",
    "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuGetErrorString", "cuLaunchKernelEx",
    "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuOccupancyMaxActiveClusters",
    "cuPointerGetAttributes", "cuTensorMapEncodeIm2col", "cuTensorMapEncodeTiled",
)  # fmt: skip
_SOURCE = """\
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuPointerGetAttribute(void **data, int attribute, unsigned long long pointer) {
    *data = (void *)pointer;
    return 0;
}
""" + "".join(f"int {name}(void) {{ return 0; }}\n" for name in _RETURNING_SUCCESS)


class NoCompilerError(Exception):
    """This host has no C compiler, or it does not make a library; the message says which."""


def build_stub(folder: Path) -> None:
    """Compile the library into `folder`. Raises NoCompilerError."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoCompilerError("there is no C compiler (gcc or clang) on this host")
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    try:
        subprocess.run(
            [*command, "-o", str(library)],
            input=_SOURCE,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise NoCompilerError(f"{compiler} cannot make a library: {reason}") from error
    (folder / "libcuda.so").symlink_to(library.name)


def activate(target: Target, folder: Path) -> None:
    """Make Triton launch through the library in `folder`, for the rest of this process."""
    ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)  # found by its name from now on
    triton.knobs.nvidia.libcuda_path = str(folder)
    drivers.set_active(_StubDriver(target))


class _StubDriver(DriverBase):
    def __init__(self, target: Target) -> None:
        from triton.backends.nvidia import driver as nvidia

        self.target, self.launcher_cls = target, nvidia.CudaLauncher
        self.utils = nvidia.CudaUtils()
        # module, function, registers, spills, most threads of a program
        self.utils.load_binary = lambda *_: (1, 1, 64, 0, 1024)
        self.utils.get_device_properties = lambda _: {
            "max_shared_mem": 232448,
            "multiprocessor_count": target.num_sms,
        }

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        cpp_type: str = ty_to_cpp(ty)
        return cpp_type

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed here: give the kernel one configuration")
