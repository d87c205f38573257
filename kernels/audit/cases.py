"""What the audit compiles: every operation with Triton kernels, at every choice of tiles."""

from dataclasses import dataclass

import torch

from kernels.audit.problems import (
    UNLIMITED,
    Problem,
    cross_entropy,
    gate,
    norm,
    rope,
    scan,
    step,
)
from kernels.ssd.shapes import Problem as Scan
from kernels.target import Target

BF16, FP32 = torch.bfloat16, torch.float32
# What the small problems are interpreted for. With so few multiprocessors a scan of two sequences
# already takes the shape that it takes on a whole GPU when it has hundreds.
SMALL_TARGET = Target("cuda", 90, 4)


@dataclass(frozen=True)
class Case:
    """One problem twice: at a size worth stating, which is compiled on the meta device, and small
    with the same kernels and tiles, which is interpreted on SMALL_TARGET to count its traffic."""

    name: str
    stated: Problem
    small: Problem


# Scans, and the length, heads and groups of a row that has the same shapes on SMALL_TARGET
SCANS = {
    (8, 4096, 16, 16, 128, 128, BF16): (70, 4, 4),
    (8, 4096, 12, 12, 64, 128, BF16): (394, 3, 3),
    (8, 4096, 12, 4, 64, 128, BF16): (394, 6, 1),
    (8, 4096, 12, 1, 64, 128, BF16): (394, 6, 1),
    (8, 4096, 32, 32, 64, 64, BF16): (70, 4, 4),
    (8, 4096, 16, 1, 128, 128, BF16): (150, 4, 1),
    (1, 4096, 8, 8, 128, 128, BF16): (70, 1, 1),
    (8, 4096, 16, 16, 128, 128, FP32): (70, 1, 1),
    (8, 4096, 16, 16, 64, 64, FP32): (70, 2, 2),
    (1, 512, 4, 4, 64, 64, FP32): (70, 1, 1),
}
# Traffic forward and backward, in multiples of the least, by heads, groups, head_dim and dtype
LIMITS = {(16, 16, 128, BF16): (2.0, 1.6), (12, 12, 64, BF16): (2.0, 1.7)}


def find(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


def cases() -> list[Case]:
    """All cases, those that take longest to compile first."""
    return [*_scans(), *_steps(), *_ropes(), *_norms(), *_gates(), *_losses()]


def _scans() -> list[Case]:
    """Every shape of `kernels.ssd.shapes`, of heads with B and C of their own and of groups."""
    found = []
    for (batch, length, heads, groups, head_dim, state_dim, dtype), small in SCANS.items():
        stated = Scan(batch, length, heads, groups, head_dim, state_dim, dtype)
        size = f"B{batch} L{length} H{heads} G{groups} P{head_dim} N{state_dim} {_name(dtype)}"
        limits = LIMITS.get((heads, groups, head_dim, dtype), UNLIMITED)
        small_scan = scan(Scan(1, *small, head_dim, state_dim, dtype))
        found.append(Case(f"ssd {size}", scan(stated, limits), small_scan))
    return found


def _steps() -> list[Case]:
    return [
        Case(
            f"ssd_step B64 H16 P128 N128 bf16, state {_name(state)}",
            step(BF16, state, batch=64, heads=16, head_dim=128, state_dim=128),
            step(BF16, state, batch=2, heads=2, head_dim=128, state_dim=128),
        )
        for state in (FP32, BF16)
    ]


def _ropes() -> list[Case]:
    return [
        Case(
            f"rope B8 L4096 H16+4 D{dim} {_name(dtype)}",
            rope(dtype, batch=8, length=4096, q_heads=16, k_heads=4, dim=dim),
            rope(dtype, batch=2, length=33, q_heads=4, k_heads=1, dim=dim),
        )
        for dim, dtype in [(64, BF16), (128, BF16), (128, FP32)]
    ]


def _norms() -> list[Case]:
    """All three forms at one width, and the fused one over the widths of the presets."""
    found = []
    for name, add, normed, channels, dtype in [
        ("rms_norm", False, True, 2048, BF16),
        ("weighted_residual", True, False, 2048, BF16),
        ("add_rms_norm", True, True, 1024, BF16),
        ("add_rms_norm", True, True, 2048, BF16),
        ("add_rms_norm", True, True, 4096, BF16),
        ("add_rms_norm", True, True, 2048, FP32),
    ]:
        stated = norm(dtype, rows=32768, channels=channels, add=add, norm=normed)
        small = norm(dtype, rows=37, channels=channels, add=add, norm=normed)
        found.append(Case(f"{name} T32768 N{channels} {_name(dtype)}", stated, small))
    return found


def _gates() -> list[Case]:
    return [
        Case(
            f"swiglu T32768 N4096 {_name(dtype)}",
            gate(dtype, rows=32768, channels=4096),
            gate(dtype, rows=5, channels=333),
        )
        for dtype in (BF16, FP32)
    ]


def _losses() -> list[Case]:
    """A block of the output head, and that of a rank of four."""
    return [
        Case(
            f"cross_entropy T8192 V{columns}{' of 4 ranks' if ranks > 1 else ''} {_name(dtype)}",
            cross_entropy(dtype, rows=8192, columns=columns, ranks=ranks),
            cross_entropy(dtype, rows=3, columns=9000, ranks=ranks),
        )
        for columns, ranks, dtype in [
            (32768, 1, BF16), (262144, 1, BF16), (32768, 1, FP32), (8192, 4, BF16),
        ]
    ]  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]
