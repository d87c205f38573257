"""Violations that are accepted, each with its reason. None is accepted on sm_90."""

from kernels.audit.rules import Allowance

ALLOWED: tuple[Allowance, ...] = (
    Allowance(
        "ssd B*N128 bf16", "chunk_backward_kernel", "sm_80", "spill",
        "at most 124 bytes: mma.sync takes both operands from registers; chunks of 16 spill nothing"
        " but move twice as many states through memory",
    ),
    Allowance(
        "ssd B*N128 fp32", "chunk_backward_kernel", "sm_80", "spill",
        "at most 96 bytes: exact float32 products run on FMA, which keeps tiles of both operands in"
        " registers; the presets train in bf16",
    ),
    Allowance(
        "ssd B*P128 N128 bf16", "scan_backward_kernel", "sm_100", "spill",
        "at most 200 bytes, once a chunk of 64 tokens; the split shape spills nothing but moves the"
        " states' gradients four times through memory",
    ),
    Allowance(
        "ssd B8 L4096 H12 G12*", "*ward", "sm_100", "traffic",
        "148 multiprocessors: a fifth segment for two waves of programs",
    ),
    Allowance(
        "ssd B8 L4096 H1[26] G1[26] *", "*ward", "sm_80", "traffic",
        "operands of products pass through registers: chunks of 32 keep twice the states of sm_90's"
        " 64, four blocks of P read B and C each, and the backward is split",
    ),
    Allowance(
        "ssd B8 L4096 H1[26] G1[26] *", "*ward", "gfx942", "traffic",
        "operands of products pass through registers: chunks of 16 keep four times the states of"
        " sm_90's 64, two blocks of P read B and C each, and the backward is split",
    ),
)  # fmt: skip
