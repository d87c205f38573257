"""Kernels interpreted on the CPU: TRITON_INTERPRET=1 python -m pytest tests/interpreted

Operations choose Triton, and strictly: a call that would fall back to torch is an error. What torch
allocates without a value is NaN.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSXSSM_KERNELS", "triton")
os.environ.setdefault("TRANSXSSM_STRICT", "1")

import torch

from tests.conftest import ON_GPU

if ON_GPU:  # the tests of the interpreter itself stay behind
    collect_ignore = [
        f"test_{name}.py"
        for name in (
            "interpreter", "memory", "launch", "traffic", "case_traffic", "operation_traffic",
            "head",
        )
    ]  # fmt: skip
else:
    from kernels.audit.interpreter import install

    install()
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
