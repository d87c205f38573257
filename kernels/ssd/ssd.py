"""The SSD scan: a state per head, decayed and written at every token, read by the same token.

Δ_t = softplus(dt_t + dt_bias)      b, c = RoPE(B), RoPE(C)
S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t b_tᵀ        S [P, N], 0 before a document's first token
y_t = S_t c_t  (+ D x_t)
"""

import itertools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from kernels.checks import (
    check_contiguous,
    check_tables,
    check_tensor,
    check_tokens,
    once_per_shape,
)
from kernels.dispatch import choose, strict
from kernels.recording import is_recorded
from kernels.ssd.chunked import ssd_chunked
from kernels.ssd.naive import ssd_naive
from kernels.ssd.operator import ssd_compiled
from kernels.ssd.tables import ScanTables, rotation_dtype, scan_tables
from kernels.target import launch_on

_PER_TOKEN = ("x", "dt", "B", "C")
_PRODUCT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cos: Tensor | None,
    sin: Tensor | None,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int = 0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    D: Tensor | None = None,
    tables: ScanTables | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan packed documents; differentiable in every floating tensor but cos and sin.

    x:             [B, L, H, P] float32, bfloat16 or float16 (float64 for gradient checks)
    dt:            [B, L, H] before softplus, x's dtype or float32
    A:             [H] float32, negative
    B, C:          [B, L, G, N] before rotation, x's dtype; head h reads group h // (H/G)
    cos, sin:      [B, L, N/2] float32, gathered by position; both None: no rotation
    dt_bias, D:    [H] float32 or x's dtype
    cu_seqlens:    [segments+1] int32 (or int64), borders over the flattened B·L tokens, 0 first,
                   B·L last, every row start among them; equal ones enclose an empty document
    chunk_size:    a power of two; 0 leaves it to the implementation, Triton takes it as an upper
                   bound (`kernels.ssd.tiles`)
    initial_state: [B, H, P, N] float32, enters the first segment of each row
    tables:        what Triton reads of cu_seqlens, cos and sin, made of these very tensors by
                   `kernels.ssd.tables.scan_tables`; so that many calls share it. None: made here

    x, dt, B and C may be column slices of one buffer, into a like of which backward then writes
    their gradients (`kernels.slices`); all else is contiguous.

    Returns y [B, L, H, P] in x's dtype, and with `output_final_state` the state at each row's end,
    [B, H, P, N] float32. Where x is float64, float32 above reads float64.

    Raises ValueError for a wrong shape, device, stride or chunk_size, TypeError for a wrong dtype.
    The values of A and cu_seqlens are read in strict mode only (`kernels.dispatch`), because that
    waits for the device.
    """
    y, final_state = _scan(
        x, dt, A, B, C, cos=cos, sin=sin, dt_bias=dt_bias, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, initial_state=initial_state, D=D, tables=tables,
    )  # fmt: skip
    return (y, final_state) if output_final_state else y


def ssd_from_log(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ssd` with A = -exp(A_log), and the final state; differentiable in A_log instead of A.

    A_log: [H] float32 or x's dtype, as layers train it. Triton's kernels compute A and the gradient
    of A_log themselves, which spares eight launches. options are the keyword arguments of `ssd` but
    output_final_state. Raises as `ssd`.
    """
    return _scan(x, dt, A_log, B, C, log_A=True, **options)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, cos: Tensor | None,
    sin: Tensor | None, dt_bias: Tensor, cu_seqlens: Tensor, chunk_size: int = 0,
    initial_state: Tensor | None = None, D: Tensor | None = None,
    tables: ScanTables | None = None, log_A: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log_A: A holds log(-A)."""
    _check(x, dt, A, B, C, cos, sin, dt_bias, cu_seqlens, chunk_size, initial_state, D, log_A)
    if strict() and not x.is_meta and not is_recorded():
        _check_values(A, log_A, cu_seqlens, *x.shape[:2])
    if tables is not None:
        _check_tables(tables, x, cos, sin, cu_seqlens)
    choice = choose("ssd", x.device, _unsupported(x, B, chunk_size))
    if choice == "triton":
        with nullcontext() if is_dynamo_compiling() else launch_on(x):
            if tables is None:
                rope = None if cos is None or sin is None else (cos, sin)
                tables = scan_tables(cu_seqlens, rope, x.shape[0] * x.shape[1], x.dtype)
            given = (x, dt, A, B, C, tables, dt_bias, chunk_size, initial_state, D, log_A)
            if is_dynamo_compiling():
                return ssd_compiled(*given)
            from kernels.ssd.fused import ssd_fused

            return ssd_fused(*given)
    if log_A:
        exact = torch.promote_types(x.dtype, torch.float32)
        A = -torch.exp(A.to(torch.float64 if choice == "naive" else exact))
    rest = (B, C, cos, sin, dt_bias, cu_seqlens, chunk_size, initial_state, D)
    return (ssd_chunked if choice == "torch" else _naive)(x, dt, A, *rest)


def _unsupported(x: Tensor, B: Tensor, chunk_size: int) -> str | None:
    """Why Triton cannot serve a call."""
    if x.dtype == torch.float64:
        return "float64 is for gradient checks"
    for name, size in (("head_dim", x.shape[-1]), ("state_dim", B.shape[-1])):
        if size not in (16, 32, 64, 128):
            return f"{name}={size} is not 16, 32, 64 or 128"
    if 0 < chunk_size < 16:
        return f"chunk_size={chunk_size} is less than 16"
    return None


def _naive(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None, sin: Tensor | None,
    dt_bias: Tensor, cu_seqlens: Tensor, chunk_size: int, initial_state: Tensor | None,
    D: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The float64 oracle, in the types of the others."""
    y, final_state = ssd_naive(
        x, dt, A, B, C, cos=cos, sin=sin, dt_bias=dt_bias, cu_seqlens=cu_seqlens,
        initial_state=initial_state, output_final_state=True, D=D,
    )  # fmt: skip
    exact = torch.promote_types(x.dtype, torch.float32)
    return y.to(x.dtype), final_state.to(exact)


@once_per_shape
def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None, sin: Tensor | None,
    dt_bias: Tensor, cu_seqlens: Tensor, chunk_size: int, initial_state: Tensor | None,
    D: Tensor | None, log_A: bool,
) -> None:  # fmt: skip
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, L, H, P], none of them 0")
    check_tensor("x", x, x.shape, _PRODUCT_DTYPES, x.device)
    batch, length, heads, head_dim = x.shape
    if B.ndim != 4 or B.shape[:2] != x.shape[:2] or heads % max(B.shape[2], 1) or 0 in B.shape:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; expected [{batch}, {length}, G, N]"
            f" with G dividing {heads} heads"
        )
    state_dim = B.shape[-1]
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    table = (batch, length, state_dim // 2)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "x": (x, tuple(x.shape), (x.dtype,)),
        "dt": (dt, (batch, length, heads), (x.dtype, exact)),
        "A_log" if log_A else "A": (A, (heads,), (exact, x.dtype) if log_A else (exact,)),
        "B": (B, tuple(B.shape), (x.dtype,)),
        "C": (C, tuple(B.shape), (x.dtype,)),
        "cos": (cos, table, (torch.float32, exact)),
        "sin": (sin, table, (torch.float32, exact)),
        "dt_bias": (dt_bias, (heads,), (exact, x.dtype)),
        "initial_state": (initial_state, (batch, heads, head_dim, state_dim), (exact,)),
        "D": (D, (heads,), (exact, x.dtype)),
    }
    check_tables(cos, sin, state_dim)
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is not None:
            check_tensor(name, tensor, shape, dtypes, x.device)
            check = check_tokens if name in _PER_TOKEN else check_contiguous
            check(name, tensor)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < batch + 1:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected [segments+1]"
            f" with at least one segment for each of {batch} rows"
        )
    check_tensor("cu_seqlens", cu_seqlens, cu_seqlens.shape, (torch.int32, torch.int64), x.device)
    check_contiguous("cu_seqlens", cu_seqlens)
    if chunk_size < 0 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size}; expected a power of two, or 0 to choose one")


def _check_tables(
    tables: ScanTables, x: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor
) -> None:
    """Raises ValueError for tables of other tensors than this call's."""
    if cu_seqlens is tables.cu_seqlens and cos is tables.cos and sin is tables.sin:
        return _check_table_shapes(x, tables.documents, tables.rotation)
    raise ValueError(
        "tables were made of another cu_seqlens, cos or sin than this call's: its documents or"
        " rotations would be those of another batch; make them of these by scan_tables"
    )


@once_per_shape
def _check_table_shapes(x: Tensor, documents: Tensor, rotation: Tensor | None) -> None:
    tokens, dtype = x.shape[0] * x.shape[1], rotation_dtype(x.dtype)
    check_tensor("tables.documents", documents, (tokens,), (torch.int32,), x.device)
    if rotation is not None:
        check_tensor("tables.rotation", rotation, rotation.shape, (dtype,), x.device)


def _check_values(A: Tensor, log_A: bool, cu_seqlens: Tensor, batch: int, length: int) -> None:
    """What only the device knows; waits for it."""
    if log_A and bool(A.isnan().any()):
        raise ValueError("A_log has values that are not numbers")
    if not log_A and not bool((A < 0).all()):  # NaN is not negative either
        raise ValueError("A has values that are not negative: every head's state must decay")
    borders = cu_seqlens.tolist()
    rows = set(range(0, batch * length + 1, length))
    rising = all(a <= b for a, b in itertools.pairwise(borders))  # equal: an empty document
    if borders[0] != 0 or borders[-1] != batch * length or not rising or rows - set(borders):
        raise ValueError(
            f"cu_seqlens {borders} does not cut {batch} rows of {length} tokens into documents:"
            f" expected rising borders from 0 to {batch * length} with every row start among them"
        )
