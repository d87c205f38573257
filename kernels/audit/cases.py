"""What the audit compiles: every operation with Triton kernels, at every tile choice.

A problem runs an operation's public function and reports each pass once it is done. A case holds
the problem twice: at a size worth stating, which is compiled on the meta device, and small with the
same tiles, which is interpreted to count its traffic.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.audit.roofline import Traffic, Work
from kernels.rope.rope import rotate_qk
from kernels.ssd import traffic
from kernels.ssd.ssd import ssd
from kernels.target import Target

# Runs the operation on a device and yields "forward", then "backward", after each.
Run = Callable[[torch.device], Iterator[str]]


@dataclass(frozen=True)
class Problem:
    run: Run
    work: Callable[[Target], dict[str, Work]]  # by pass


@dataclass(frozen=True)
class Case:
    name: str
    stated: Problem
    small: Problem


def find(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


def cases() -> list[Case]:
    """All cases, those that take longest to compile first."""
    bf16, fp32 = torch.bfloat16, torch.float32
    scans = [
        Case(
            f"ssd {shape} P{head_dim} N{state_dim} {_name(dtype)}",
            scan(traffic.Problem(batch, length, heads, head_dim, state_dim, dtype), bounded),
            # as many sequences as make it the same shape
            scan(traffic.Problem(1, 70, small, head_dim, state_dim, dtype), bounded=False),
        )
        for shape, batch, length, heads, head_dim, state_dim, dtype, small, bounded in [
            ("fused", 8, 4096, 16, 128, 128, bf16, 152, True),
            ("fused", 8, 4096, 32, 64, 128, bf16, 152, False),
            ("split", 1, 65536, 8, 128, 128, bf16, 2, False),
            ("fused", 8, 4096, 16, 64, 64, fp32, 152, False),
        ]
    ]
    ropes = [
        Case(
            f"rope D{dim} {_name(dtype)}",
            rope(dtype, batch=8, length=4096, q_heads=16, k_heads=4, dim=dim),
            rope(dtype, batch=2, length=33, q_heads=4, k_heads=1, dim=dim),
        )
        for dim, dtype in [(64, bf16), (128, bf16), (128, fp32)]
    ]
    return scans + ropes


def scan(problem: traffic.Problem, bounded: bool) -> Problem:
    """bounded: held to at most 2.0 times the least traffic forward, 1.6 times backward."""
    batch, length, heads = problem.batch, problem.length, problem.heads
    dtype = problem.dtype

    def run(device: torch.device) -> Iterator[str]:
        x = _random(batch, length, heads, problem.head_dim, dtype=dtype, device=device)
        B, C = (
            _random(batch, length, heads, problem.state_dim, dtype=dtype, device=device)
            for _ in range(2)
        )
        dt = _random(batch, length, heads, dtype=dtype, device=device)
        A, dt_bias = (torch.rand(heads, device=device) for _ in range(2))
        cos, sin = (torch.rand(batch, length, problem.state_dim // 2, device=device) for _ in "cs")
        borders = torch.arange(batch + 1, device=device, dtype=torch.int32) * length
        y = ssd(
            x, dt, (-1 - A).requires_grad_(), B, C,
            cos=cos, sin=sin, dt_bias=dt_bias.requires_grad_(), cu_seqlens=borders,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        yield from _passes((x, dt, B, C), [y])

    def work(target: Target) -> dict[str, Work]:
        least = dict(zip(("forward", "backward"), traffic.minimum(problem), strict=True))
        allowed = {"forward": 2.0, "backward": 1.6} if bounded else {}
        found = {}
        for name, count in (("forward", traffic.forward), ("backward", traffic.backward)):
            loaded, stored, flops = count(problem, target)
            limit = allowed.get(name, float("inf"))
            found[name] = Work(Traffic(loaded, stored), least[name], flops, limit)
        return found

    return Problem(run, work)


def rope(
    dtype: torch.dtype, *, batch: int, length: int, q_heads: int, k_heads: int, dim: int
) -> Problem:
    def run(device: torch.device) -> Iterator[str]:
        q = _random(batch, length, q_heads, dim, dtype=dtype, device=device)
        k = _random(batch, length, k_heads, dim, dtype=dtype, device=device)
        cos, sin = (torch.rand(batch, length, dim // 2, device=device) for _ in range(2))
        yield from _passes((q, k), rotate_qk(q, k, cos, sin))

    def work(target: Target) -> dict[str, Work]:
        from kernels.rope import fused

        tokens, heads = batch * length, q_heads + k_heads
        moved = Traffic(*fused.traffic(tokens, heads, dim, dtype.itemsize, target.num_sms))
        minimum = tokens * (2 * heads * dim * dtype.itemsize + 4 * dim)
        return dict.fromkeys(("forward", "backward"), Work(moved, minimum, flops=0))

    return Problem(run, work)


def _passes(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Iterator[str]:
    """Of an operation that has just run forward."""
    yield "forward"
    torch.autograd.grad(outputs, inputs, [torch.rand_like(y) for y in outputs])
    yield "backward"


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.rand(shape, dtype=dtype, device=device).requires_grad_()


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
