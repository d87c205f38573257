"""Small kernels with a known property each, and their launch code."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

META = torch.device("meta")
BLOCK = 2048  # elements a program of copy_kernel moves


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision="ieee"))


@triton.jit
def converted_product_kernel(a, b, c, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    left, right = tl.load(a + at).to(tl.float32), tl.load(b + at).to(tl.float32)
    tl.store(c + at, tl.dot(left, right, input_precision="ieee"))


@triton.jit
def blocked_product_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        left = tl.load(a + m[:, None] * K + (start + k)[None, :])
        right = tl.load(b + n[:, None] * K + (start + k)[None, :])
        total = tl.dot(left, right.T, total)
    tl.store(c + m[:, None] * N + n[None, :], total.to(tl.bfloat16))


@triton.jit
def accumulate(left, right, total):
    return tl.dot(left, right, total)


@triton.jit
def scan_kernel(
    x, b, c, y, length, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr
):
    """Chunks of a decayed state: the shape of the SSD scan."""
    p, n, q = tl.arange(0, P), tl.arange(0, N), tl.arange(0, CHUNK)
    state = tl.zeros((P, N), tl.float32)
    for start in tl.range(0, length, CHUNK, num_stages=STAGES):
        write = tl.load(x + (start + q)[:, None] * P + p[None, :])
        key = tl.load(b + (start + q)[:, None] * N + n[None, :])
        query = tl.load(c + (start + q)[:, None] * N + n[None, :])
        scores = tl.where(q[:, None] >= q[None, :], tl.dot(query, key.T), 0.0)
        out = tl.dot(scores.to(write.dtype), write)
        out = accumulate(query, state.to(write.dtype).T, out)
        state = accumulate(write.T, key, state * 0.5)
        tl.store(y + (start + q)[:, None] * P + p[None, :], out.to(write.dtype))


@triton.jit
def copy_kernel(source, target, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


@triton.jit
def sum_kernel(source, total, BLOCK: tl.constexpr):
    tl.atomic_add(total, tl.sum(tl.load(source + tl.arange(0, BLOCK))))


def product(m: int, n: int, k: int, dtype: torch.dtype, **options: Any) -> None:
    a, b = torch.empty(m, k, dtype=dtype, device=META), torch.empty(k, n, dtype=dtype, device=META)
    c = torch.empty(m, n, device=META)
    product_kernel[(1,)](a, b, c, m, n, k, **options)


def converted_product(dtype: torch.dtype) -> None:
    a, b = (torch.empty(16, 16, dtype=dtype, device=META) for _ in range(2))
    converted_product_kernel[(1,)](a, b, torch.empty(16, 16, device=META), 16)


def blocked_product(m: int, n: int, block: int, **options: Any) -> None:
    a = torch.empty(m, 1024, dtype=torch.bfloat16, device=META)
    b = torch.empty(n, 1024, dtype=torch.bfloat16, device=META)
    c = torch.empty(m, n, dtype=torch.bfloat16, device=META)
    blocked_product_kernel[(1,)](a, b, c, 1024, m, n, block, **options)


def scan(p: int, n: int, chunk: int, stages: int, **options: Any) -> None:
    x, y = (torch.empty(512, p, dtype=torch.bfloat16, device=META) for _ in range(2))
    b, c = (torch.empty(512, n, dtype=torch.bfloat16, device=META) for _ in range(2))
    scan_kernel[(4,)](x, b, c, y, 512, p, n, chunk, stages, **options)


class Copied(torch.autograd.Function):
    """Launches copy_kernel forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return copied(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return copied(grad)


def copied(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    copy_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK)
    return out


def summed(x: Tensor) -> Tensor:
    total = torch.empty((), device=x.device)
    sum_kernel[(1,)](x, total, x.numel())
    return total
