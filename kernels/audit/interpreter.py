"""Triton's CPU interpreter, made to compute what a GPU computes and to refuse what it must not do.

    TRITON_INTERPRET=1 in the environment; then, before the first kernel runs, install()

What changes:
- bfloat16: values, rounding (to nearest even, at every operation), comparisons, constants, products
  with float32 sums. Float arguments are float32. The stock interpreter is silently wrong in these.
- `input_precision="tf32"`, Triton's default for float32 products, really loses the mantissa's end.
- Every access is checked (kernels.audit.memory): bounds, alignment, races between programs; what a
  masked load leaves undefined is NaN. Traffic is counted (kernels.audit.traffic).
- tl.device_assert and the check for integer overflow are on.
- A kernel with several autotune configurations takes the first; nothing is timed.
- Errors come as they are raised, not as the text of an InterpreterError.

Not seen, and left to compilation: layouts, shared memory, registers, num_warps, num_stages, and a
loop-carried value that changes its dtype. Not offered: float8 to and from bfloat16, bfloat16
atomics, libdevice, inline assembly. A process that interprets can no longer compile.
"""

import functools
import importlib
import types
from typing import Any

from kernels.target import interpreting

TRIED_WITH = ("3.8.0",)


def install() -> None:
    """Change the interpreter of this process. Calling it again changes nothing more.

    Raises RuntimeError if Triton is not interpreting, or its version was not tried.
    """
    # Not imported above: the check of the environment comes before Triton reads it.
    if not interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is not set; set TRITON_INTERPRET=1 before Python starts"
        )
    triton = importlib.import_module("triton")
    if triton.__version__ not in TRIED_WITH:
        raise RuntimeError(
            f"Triton {triton.__version__}: its interpreter was not tried; install Triton"
            f" {' or '.join(TRIED_WITH)}, or add this version to TRIED_WITH in {__name__} and run"
            " tests/interpreted/test_interpreter.py"
        )
    if type(triton.language.zeros).__name__ != "InterpretedFunction":
        raise RuntimeError(
            "triton was imported before TRITON_INTERPRET=1 was set; set it before Python starts"
        )
    _install()


@functools.cache
def _install() -> None:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter as stock
    from triton.runtime.autotuner import Autotuner

    from kernels.audit import builder, launch, reductions

    stock.interpreter_builder = stock.interpreter_semantic.builder = builder.Builder()
    stock.interpreter_semantic.load = builder.remember_other(stock.interpreter_semantic)
    stock.TensorHandle.__post_init__ = builder.finish_handle
    stock._get_np_dtype = builder.value_dtype
    stock._validate_np_data_size = builder.fits
    stock._implicit_cvt = launch.implicit_conversion
    stock.GridExecutor = launch.GuardedLaunch
    stock.ReduceOps.generic_reduce = reductions.reduce
    stock.ReduceOps.sum = reductions.sum_with_rounding
    stock.ScanOps.generic_scan = reductions.scan
    triton.knobs.compilation.front_end_debugging = True  # raise errors as they are

    # triton.language is patched for good, once: this process compiles nothing, and the stock
    # interpreter does it anew at every launch and every call of a device function.
    for module in (tl, tl.core):
        stock._patch_lang(types.SimpleNamespace(__globals__={"tl": module}))
    stock._patch_lang = lambda _: stock._LangPatchScope()
    stock.InterpretedFunction.__call__ = launch.call_device_function

    stock_run = Autotuner.run

    def run_first_configuration(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        tuner.configs = tuner.configs[:1]
        return stock_run(tuner, *args, **kwargs)

    Autotuner.run = run_first_configuration
