"""Count the traffic of every small problem in Triton's interpreter: a process of its own.

    TRITON_INTERPRET=1 TRANSXSSM_KERNELS=triton python -m kernels.audit.counting CASE ...

prints one JSON object, case -> pass -> [bytes loaded, bytes stored, bytes of atomics].
"""

import json
import sys

import torch

import kernels.target
from kernels.audit.cases import SMALL_TARGET, Case, find
from kernels.audit.interpreter import install
from kernels.audit.traffic import count_traffic


def count(case: Case) -> dict[str, list[int]]:
    """Summed over the kernels of each pass."""
    counted: dict[str, list[int]] = {}
    passes = case.small.run(torch.device("cpu"))
    while True:
        with count_traffic() as traffic:
            name = next(passes, None)
        if name is None:
            return counted
        kernels = traffic.values()
        counted[name] = [
            sum(k.loaded for k in kernels),
            sum(k.stored for k in kernels),
            sum(k.atomic for k in kernels),
        ]


if __name__ == "__main__":
    install()
    kernels.target.INTERPRETED = SMALL_TARGET
    json.dump({name: count(find(name)) for name in sys.argv[1:]}, sys.stdout)
