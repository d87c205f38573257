"""Rotary position embedding of queries and keys, rotate-half (NeoX) pairing.

    o_k       = q_k · cos_k - q_{k+D/2} · sin_k
    o_{k+D/2} = q_{k+D/2} · cos_k + q_k · sin_k              k = 0 .. D/2-1

The gradient is the transposed map, the same rotation by -sin, so backward needs cos and sin alone.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from kernels.checks import check_floating, check_rows, check_tensor, once_per_shape
from kernels.dispatch import choose
from kernels.rope import blocked
from kernels.rope.naive import apply_rope_naive
from kernels.rope.operator import rotate_operator
from kernels.slices import buffer_size, shared_stride, sliced
from kernels.target import launch_on


def rotate_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions' angles, in one launch.

    q, k:     [B, L, Hq, D] and [B, L, Hk, D] of one floating dtype, last dimension contiguous (a
              view of a projection will do); computed in float32 (float64 for float64)
    cos, sin: float32 [B, L, D/2], gathered by position from `kernels.rope.table.rotary_cos_sin`
    inplace:  overwrite q and k and return them; torch.compile decides about that by itself

    Returns q and k rotated, contiguous unless in place.

    Raises ValueError for a wrong shape, device or stride, and for an in-place rotation that
    autograd cannot record (of a leaf or a view that requires grad); TypeError for a wrong dtype.
    """
    _check(("q", q), ("k", k), cos=cos, sin=sin, inplace=inplace)
    rotated_q, rotated_k = _rotate("rotate_qk", (q, k), cos, sin, inplace)
    return rotated_q, rotated_k


def rotate_qkv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys as rotate_qk, and let values [B, L, Hk, D] through.

    Where the three are column slices of one buffer, backward writes their gradients into another
    like it (`kernels.slices`).
    """
    _check(("q", q), ("k", k), cos=cos, sin=sin, inplace=inplace)
    check_tensor("v", v, v.shape, (q.dtype,), q.device)
    rotated_q, rotated_k, same_v = _rotate("rotate_qk", (q, k), cos, sin, inplace, (v,))
    return rotated_q, rotated_k, same_v


def apply_rope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate one tensor [B, L, H, D]; otherwise as rotate_qk."""
    _check(("q", q), cos=cos, sin=sin, inplace=False)
    return _rotate("apply_rope", (q,), cos, sin, False)[0]


def _rotate(
    op: str,
    tensors: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    inplace: bool,
    others: tuple[Tensor, ...] = (),
) -> tuple[Tensor, ...]:
    """`tensors`, rotated, and `others` as they are."""
    q = tensors[0]
    unsupported = "Triton kernels compute in float32, not float64"
    choice = choose(op, q.device, unsupported if q.dtype == torch.float64 else None)
    if choice == "naive":
        exact = tuple(apply_rope_naive(t, cos, sin).to(t.dtype) for t in tensors)
        if inplace:
            exact = tuple(t.copy_(e) for t, e in zip(tensors, exact, strict=True))
        return exact + others
    if is_dynamo_compiling():  # which may overwrite what nobody reads again by itself
        return *rotate_operator(tensors, cos, sin, False, choice == "triton"), *others
    rotated: tuple[Tensor, ...] = _Rotate.apply(
        choice, inplace, len(tensors), cos, sin, *tensors, *others
    )
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, choice: str, inplace: bool, rotated: int, cos: Tensor, sin: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(cos, sin)
        ctx.choice, ctx.rotated = choice, rotated
        ctx.stride = shared_stride(tensors)
        turned, others = tensors[:rotated], tensors[rotated:]
        if inplace:
            ctx.mark_dirty(*turned)
        out = turned if inplace else _empty_like(turned)
        _run(choice, turned, out, cos, sin, conjugate=False)
        return (*out, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple([g if g.stride(-1) == 1 else g.contiguous() for g in grads])
        given, others = grads[: ctx.rotated], grads[ctx.rotated :]
        if ctx.stride:
            shapes = [g.shape for g in grads]
            buffer = grads[0].new_empty(buffer_size(shapes, ctx.stride))
            out = sliced(buffer, shapes, ctx.stride)
            copied = tuple(zip(others, out[ctx.rotated :], strict=True))
        else:
            out, copied = (*_empty_like(given), *others), ()
        cos, sin = ctx.saved_tensors
        _run(ctx.choice, given, out[: ctx.rotated], cos, sin, copied, conjugate=True)
        return None, None, None, None, None, *out


def _run(
    choice: str,
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    copied: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    conjugate: bool,
) -> None:
    """Rotate `tensors` into `out`; copied: at most one tensor, and where it goes."""
    if choice == "triton":
        from kernels.rope import fused

        with launch_on(cos):
            fused.rotate(tensors, out, cos, sin, conjugate, *copied)
    else:
        blocked.rotate(tensors, out, cos, sin, conjugate)
        for source, target in copied:
            target.copy_(source)


def _empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _check(*named: tuple[str, Tensor], cos: Tensor, sin: Tensor, inplace: bool) -> None:
    _check_shapes(cos, sin, *itertools.chain.from_iterable(named))
    if inplace and not is_dynamo_compiling():
        for name, tensor in named:
            _check_overwritable(name, tensor)


@once_per_shape
def _check_shapes(cos: Tensor, sin: Tensor, *named: Any) -> None:
    """named: a name, its tensor, and so on."""
    pairs: list[tuple[str, Tensor]] = list(zip(named[::2], named[1::2], strict=True))
    first = pairs[0][1]
    for name, tensor in pairs:
        if tensor.ndim != 4 or tensor.shape[-1] % 2 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected [B, L, H, D] with D even"
            )
        check_floating(name, tensor)
        batch, length, _, dim = first.shape
        heads = tensor.shape[2]
        check_tensor(name, tensor, (batch, length, heads, dim), (first.dtype,), first.device)
        check_rows(name, tensor)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (batch, length, dim // 2), (torch.float32,), first.device)


def _check_overwritable(name: str, tensor: Tensor) -> None:
    if any(stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        raise ValueError(f"{name} is expanded: it shares memory with itself; pass inplace=False")
    recorded = torch.is_grad_enabled() and tensor.requires_grad
    # autograd allows no in-place function of several outputs on a view
    if recorded and (tensor.is_leaf or tensor._is_view()):
        kind = "a leaf" if tensor.is_leaf else "a view"
        raise ValueError(f"{name} is {kind} that requires grad; pass inplace=False")
