"""Violations that are accepted, each with its reason.

On sm_90 only kernels of heads that share groups have any.
"""

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
        "ssd B8 L4096 H12 G12 P64 *", "scan_backward_kernel", "sm_100", "spill",
        "at most 68 bytes, once a chunk of 64 tokens",
    ),
    *(
        Allowance(
            "ssd B8 L4096 H1[26] G[14] *", kernel, target, "spill",
            "at most 340 bytes forward and 990 backward: states of two heads, and dB and dC of a"
            " group, are held in registers, and what does not fit beside them lies in local memory;"
            " shorter chunks have not been tried",
        )
        for kernel, target in (
            ("scan_kernel*", "sm_90"),
            ("chunk_backward_kernel", "sm_90"),
            ("chunk_backward_kernel", "sm_100"),
        )
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
