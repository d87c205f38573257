"""Checks of an operation's arguments that read no device memory; errors name the argument."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from kernels.slices import row_stride_of

REMEMBERED = 10_000  # arguments that passed a check, at most: shapes of generation never repeat


def once_per_shape(check: Callable[..., None]) -> Callable[..., None]:
    """Run a check once for each combination of what it may read of its positional arguments: shape,
    strides, dtype and device of tensors, and the value of all else, which is hashable.

    Arguments that fail the check are checked again each time.
    """
    passed: set[tuple[Any, ...]] = set()

    @wraps(check)
    def checked(*arguments: Any) -> None:
        if is_dynamo_compiling():  # there a check runs once anyway
            return check(*arguments)
        key = tuple(
            [
                (a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a
                for a in arguments
            ]
        )
        if key not in passed:
            check(*arguments)
            if len(passed) >= REMEMBERED:
                passed.clear()
            passed.add(key)
        return None

    return checked


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Raises ValueError for another shape or device, TypeError for a dtype not in `dtypes`."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, as the rest")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the dtype is a real floating-point one."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")


def check_rows(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the last dimension is contiguous."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; its last dimension must be contiguous"
            f" (pass {name}.contiguous())"
        )


def check_tokens(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless tokens are rows at equal distances, as of a slice of a buffer."""
    if row_stride_of(tensor.shape, tensor.stride()) is None:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; a token's numbers must be contiguous and tokens"
            f" at equal distances (pass {name}.contiguous())"
        )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that is not contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} is not contiguous (strides {tensor.stride()}); pass {name}.contiguous()"
        )


def check_tables(cos: Tensor | None, sin: Tensor | None, state_dim: int) -> None:
    """Raises ValueError unless both rotation tables are there or none, and B and C have pairs."""
    if (cos is None) != (sin is None):
        missing = "cos" if cos is None else "sin"
        raise ValueError(f"{missing} is None; pass both cos and sin or none")
    if cos is not None and state_dim % 2:
        raise ValueError(f"B has N={state_dim}; RoPE rotates pairs and needs N even")
