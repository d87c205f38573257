"""Violations that are accepted, each with its reason. None is accepted on sm_90."""

from kernels.audit.rules import Allowance

_FLOAT32 = (
    "exact float32 products run on FMA, which keeps tiles of both operands in registers; the"
    " presets train in bf16"
)

ALLOWED: tuple[Allowance, ...] = (
    Allowance(
        "ssd B*bf16", "*", "sm_80", "spill",
        "tiles are chosen for sm_90; mma.sync reads both operands from registers, wgmma from shared"
        " memory",
    ),
    Allowance("ssd B*fp32", "*", "sm_80", "spill", _FLOAT32),
    Allowance(
        "ssd B*bf16", "*backward_kernel", "sm_100", "spill",
        "tiles are chosen for sm_90; the backward uses all 255 registers and lacks a few dozen",
    ),
    Allowance("ssd B*fp32", "*backward_kernel", "sm_100", "spill", _FLOAT32),
    Allowance(
        "ssd B*bf16", "*", "gfx942", "spill",
        "tiles are chosen for sm_90; eight waves leave each thread 256 registers, and what mfma"
        " reads stays in them",
    ),
    Allowance("ssd B*fp32", "*", "gfx942", "spill", _FLOAT32),
    Allowance(
        "ssd B8 L4096 H16*", "*ward", "gfx942", "traffic",
        "128 sequences do not fill half of 304 compute units, so the split shape is taken, whose"
        " programs share out each sequence for a second trip of the states through memory",
    ),
)  # fmt: skip
