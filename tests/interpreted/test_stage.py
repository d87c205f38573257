"""A pipeline stage on the Triton kernels, beside the same stage on PyTorch's operations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ranks import run_ranks
from tests.tiny import MODEL

LENGTHS = [23, 1, 40]


def gradients(kernels: str, parallel: dict[str, Any]) -> dict[str, Tensor]:
    """The final norm's output and every parameter's gradient of a packed row, in float32."""
    import os

    from kernels.audit.interpreter import install
    from kernels.dispatch import chosen
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment

    install()
    os.environ["TRANSXSSM_KERNELS"] = kernels
    layout = ParallelConfig(**parallel)
    device = prepare_host()
    init_distributed(launch_from_environment(), device)
    init_groups(layout)
    built = build_stage(
        ModelConfig(**(MODEL | {"head_dim": 16})), layout, seq_len=64, dtype=torch.float32, seed=3,
        deterministic=False, device=device,
    )  # fmt: skip
    stage = built.chunks[0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stage.parameters():  # norms and residual weights are 1 at initialisation
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(0, 300, (1, 64), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    borders = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    hidden = stage.hidden(ids, positions, borders)
    hidden.backward(torch.randn(hidden.shape, generator=generator))
    assert chosen["ssd"] == chosen["add_rms_norm"] == {kernels}
    found = {n: p.grad for n, p in stage.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach()} | found


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    found: dict[str, Tensor] = run_ranks(1, gradients, "torch", {})[0]
    return found


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_stage_is_the_same_in_triton(recompute: str, expected: dict[str, Tensor]) -> None:
    (found,) = run_ranks(1, gradients, "triton", {"recompute": recompute})
    assert found.keys() == expected.keys()
    errors = {n: ((found[n] - e).norm() / e.norm()).item() for n, e in expected.items()}
    assert max(errors.values()) < 2e-5, errors
