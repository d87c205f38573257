"""What each operation with Triton kernels does at a given size: a run of it, and its work.

A problem runs the operation's public function, forward and backward, and reports each pass once it
is done. Formulas of traffic stand beside the kernels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.audit.roofline import Traffic, Work
from kernels.cross_entropy.cross_entropy import cross_entropy_
from kernels.norm.norm import add_rms_norm, branch_rms_norm, weighted_residual
from kernels.rope.rope import rotate_qkv
from kernels.slices import ROW_ELEMENTS
from kernels.ssd import shapes, traffic
from kernels.ssd.choice import choose_shape
from kernels.ssd.ssd import ssd
from kernels.ssd.step import ssd_step
from kernels.ssd.tiles import tile
from kernels.swiglu.swiglu import swiglu
from kernels.target import Target


@dataclass(frozen=True)
class Problem:
    run: Callable[[torch.device], Iterator[str]]  # yields "forward", then "backward", after each
    work: Callable[[Target], dict[str, Work]]  # by pass


Limits = tuple[float, float]
UNLIMITED = float("inf"), float("inf")


def scan(size: shapes.Problem, limits: Limits = UNLIMITED) -> Problem:
    """limits: traffic forward and backward, in multiples of the least."""
    batch, length, heads, dtype = size.batch, size.length, size.heads, size.dtype

    def run(device: torch.device) -> Iterator[str]:
        shared = size.groups, size.state_dim
        columns = (heads, size.head_dim), shared, shared, (heads,)
        x, B, C, dt = _side_by_side((batch, length), columns, dtype, device)
        A, dt_bias = (torch.rand(heads, device=device) for _ in range(2))
        cos, sin = (torch.rand(batch, length, size.state_dim // 2, device=device) for _ in range(2))
        borders = torch.arange(batch + 1, device=device, dtype=torch.int32) * length
        y = ssd(
            x, dt, (-1 - A).requires_grad_(), B, C,
            cos=cos, sin=sin, dt_bias=dt_bias.requires_grad_(), cu_seqlens=borders,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        yield from _passes((x, dt, B, C), [y])

    def work(target: Target) -> dict[str, Work]:
        least, found = traffic.minimum(size), {}
        choice = tile(target, dtype, size.head_dim, size.state_dim, 0)
        for n, (name, count) in enumerate(
            {"forward": traffic.forward, "backward": traffic.backward}.items()
        ):
            moved = count(size, choice, choose_shape(size, choice, target, name == "backward"))
            bytes_moved = Traffic(moved.loaded, moved.stored)
            found[name] = Work(bytes_moved, least[n], moved.flops, limits[n])
        return found

    return Problem(run, work)


def step(
    dtype: torch.dtype, state_dtype: torch.dtype, *, batch: int, heads: int, head_dim: int,
    state_dim: int,
) -> Problem:  # fmt: skip
    """One token, decoded: forward alone."""

    def run(device: torch.device) -> Iterator[str]:
        state = torch.rand(batch, heads, head_dim, state_dim, dtype=state_dtype, device=device)
        x = torch.rand(batch, heads, head_dim, dtype=dtype, device=device)
        dt = torch.rand(batch, heads, dtype=dtype, device=device)
        B, C = (torch.rand(batch, heads, state_dim, dtype=dtype, device=device) for _ in range(2))
        A, dt_bias = (torch.rand(heads, device=device) for _ in range(2))
        cos, sin = (torch.rand(batch, state_dim // 2, device=device) for _ in range(2))
        ssd_step(state, x, dt, -1 - A, B, C, cos=cos, sin=sin, dt_bias=dt_bias)
        yield "forward"

    def work(target: Target) -> dict[str, Work]:
        from kernels.ssd.fused_step import traffic

        sizes = (dtype.itemsize, state_dtype.itemsize)
        moved = Traffic(*traffic(batch, heads, head_dim, state_dim, *sizes))
        state = 2 * head_dim * state_dim * state_dtype.itemsize
        vectors = (2 * head_dim + 2 * state_dim + 1) * dtype.itemsize
        return {"forward": Work(moved, batch * heads * (state + vectors), flops=0)}

    return Problem(run, work)


def rope(
    dtype: torch.dtype, *, batch: int, length: int, q_heads: int, k_heads: int, dim: int
) -> Problem:
    def run(device: torch.device) -> Iterator[str]:
        columns = (q_heads, dim), (k_heads, dim), (k_heads, dim)
        q, k, v = _side_by_side((batch, length), columns, dtype, device)
        cos, sin = (torch.rand(batch, length, dim // 2, device=device) for _ in range(2))
        yield from _passes((q, k, v), rotate_qkv(q, k, v, cos, sin))

    def work(target: Target) -> dict[str, Work]:
        from kernels.rope import fused

        def moved(heads: int) -> Work:
            size = tokens, heads, dim, dtype.itemsize
            minimum = tokens * (2 * heads * dim * dtype.itemsize + 4 * dim)
            return Work(Traffic(*fused.traffic(*size, target.num_sms)), minimum, flops=0)

        tokens = batch * length
        # backward puts the gradient of values beside those of queries and keys
        return {"forward": moved(q_heads + k_heads), "backward": moved(q_heads + 2 * k_heads)}

    return Problem(run, work)


def norm(dtype: torch.dtype, *, rows: int, channels: int, add: bool, norm: bool) -> Problem:
    """add: the weighted residual; norm: RMSNorm; both: in one pass."""

    def run(device: torch.device) -> Iterator[str]:
        h, update = (_random(rows, channels, dtype=dtype, device=device) for _ in range(2))
        r, w = (_random(channels, dtype=dtype, device=device) for _ in range(2))
        if add and norm:
            yield from _passes((h, update, r, w), add_rms_norm(h, update, r, w, 1e-6))
        elif add:
            yield from _passes((h, update, r), [weighted_residual(h, update, r)])
        else:
            yield from _passes((h, w), branch_rms_norm(h, w, 1e-6))

    def work(target: Target) -> dict[str, Work]:
        from kernels.norm import fused

        size = (rows, channels, dtype.itemsize, target.num_sms)
        forward = Traffic(*fused.forward_traffic(*size, add=add, norm=norm))
        backward = Traffic(*fused.backward_traffic(*size, add=add, norm=norm))
        array = rows * channels * dtype.itemsize
        # read h (and update), write h' and u; read h, h', dh' and du, write dh (and d_update)
        forward_arrays, backward_arrays = 1 + 2 * add + norm, 2 + add + 2 * norm + (add and norm)
        return {
            "forward": Work(forward, forward_arrays * array, flops=0),
            "backward": Work(backward, backward_arrays * array, flops=0),
        }

    return Problem(run, work)


def gate(dtype: torch.dtype, *, rows: int, channels: int) -> Problem:
    """The SwiGLU product."""

    def run(device: torch.device) -> Iterator[str]:
        gate, up = _side_by_side((rows, 1), ((channels,), (channels,)), dtype, device)
        yield from _passes((gate, up), [swiglu(gate, up)])

    def work(target: Target) -> dict[str, Work]:
        from kernels.swiglu import fused

        array = rows * channels * dtype.itemsize
        forward = Traffic(*fused.forward_traffic(rows * channels, dtype.itemsize))
        backward = Traffic(*fused.backward_traffic(rows * channels, dtype.itemsize))
        return {
            "forward": Work(forward, 3 * array, flops=0),
            "backward": Work(backward, 5 * array, flops=0),
        }

    return Problem(run, work)


def cross_entropy(dtype: torch.dtype, *, rows: int, columns: int, ranks: int = 1) -> Problem:
    """Loss and gradient at once, in place: "forward" alone. ranks: that the vocabulary is split
    over, of which the first runs, with so many columns."""

    def run(device: torch.device) -> Iterator[str]:
        from kernels.cross_entropy import fused

        logits = torch.rand(rows, columns, dtype=dtype, device=device)
        labels = torch.randint(columns, (rows,), device=device)
        weights, loss, missed = (torch.rand(rows, device=device) for _ in range(3))
        if ranks == 1:
            cross_entropy_(logits, labels, weights, valid=columns - 7, out=(loss, missed))
        else:
            found = fused.statistics(logits, labels, 0, columns)
            found = found.expand(ranks, -1, -1).contiguous()  # as if the ranks were alike
            fused.finish(
                logits, labels, weights, found, (loss, missed), 0, columns, ranks * columns, 0.0,
                True,
            )  # fmt: skip
        yield "forward"

    def work(target: Target) -> dict[str, Work]:
        from kernels.cross_entropy import fused

        moved = Traffic(*fused.traffic(rows, columns, dtype.itemsize, ranks))
        # read logits, label and weight, write gradient, loss and whether it was missed
        minimum = rows * (2 * columns * dtype.itemsize + 8 + 4 + 2 * 4)
        return {"forward": Work(moved, minimum, flops=0, allowed=1.6)}

    return Problem(run, work)


def _passes(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Iterator[str]:
    """Of an operation that has just run forward."""
    yield "forward"
    torch.autograd.grad(outputs, inputs, [torch.rand_like(y) for y in outputs])
    yield "backward"


def _side_by_side(
    tokens: tuple[int, int], columns: Sequence[Sequence[int]], dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:  # fmt: skip
    """Slices of one buffer, as a training step's projections give them."""
    widths = [math.prod(shape) for shape in columns]
    row = -(-sum(widths) // ROW_ELEMENTS) * ROW_ELEMENTS
    buffer = torch.rand(*tokens, row, dtype=dtype, device=device)
    parts = buffer[..., : sum(widths)].split(widths, -1)
    return [
        part.view(*tokens, *shape).requires_grad_()
        for part, shape in zip(parts, columns, strict=True)
    ]


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.rand(shape, dtype=dtype, device=device).requires_grad_()
