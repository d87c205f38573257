"""What runs around an interpreted kernel's programs. Imported by interpreter.install() alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.audit import traffic
from kernels.audit.memory import Memory

_stock_implicit_cvt = stock._implicit_cvt


class GuardedLaunch(stock.GridExecutor):
    """One launch: the tensors go to a Memory of their own and come back when all programs ran."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            with np.errstate(all="ignore"):  # GPUs do not warn
                super().__call__(*args, **kwargs)
        finally:
            stock.interpreter_builder.memory = None

    def _init_args_hst(self, args: Any, kwargs: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        named: list[tuple[str, torch.Tensor]] = []
        for name, argument in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
            named += ((name, tensor) for tensor in _tensors(argument))
        memory = stock.interpreter_builder.memory = Memory(self.fn.__name__, named)
        return (
            [_map_tensors(argument, memory.copy_of) for argument in args],
            {name: _map_tensors(argument, memory.copy_of) for name, argument in kwargs.items()},
        )

    def _restore_args_dev(self, *_: Any) -> None:
        memory = stock.interpreter_builder.memory
        memory.finish()
        traffic.record(memory)


def _map_tensors(argument: Any, apply: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`argument` with `apply` done to every tensor in it, also in tuples and descriptors."""
    if isinstance(argument, torch.Tensor):
        return apply(argument)
    if isinstance(argument, tuple):
        return stock._tuple_create(argument, [_map_tensors(part, apply) for part in argument])
    if isinstance(argument, TensorDescriptor):
        return dataclasses.replace(argument, base=apply(argument.base))
    return argument


def _tensors(argument: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(argument, note)
    return found


def implicit_conversion(argument: Any) -> Any:
    """A kernel argument as the compiler types it: a Python float is a float32 scalar, where the
    stock interpreter keeps it a literal that takes the other operand's dtype."""
    if isinstance(argument, float):
        handle = stock.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _stock_implicit_cvt(argument)


def call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """InterpretedFunction.__call__, without patching triton.language at every call."""
    return function.rewrite()(*args, **kwargs)
