"""Compiled layers: one graph each, and what eager ones train."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity import MODEL
from benchmarks.ranks import run_ranks
from tests.parallel.test_graphs import STEPS, training

SMALL = MODEL | {"num_layers": 2}  # one of each kind
RIVAL = SMALL | {"ssd_conv_width": 4, "ssd_groups": 4}


def trained(
    layout: dict[str, Any], dtype: str, model: dict[str, Any], backend: str
) -> tuple[list[float], dict[str, Tensor], int, list[str]]:
    """Losses, parameters, number of graphs, and what was warned of or broke a graph; no backend:
    eager.

    One step has half of the rows, and another rows that are single documents.
    """
    from parallel.compiled import compile_layers
    from parallel.schedule import count_tokens, forward_backward

    zero, device, batches = training(layout, dtype, model)
    if backend:
        compile_layers(zero.built, backend)
    losses = []
    with warnings.catch_warnings(record=True) as warned:
        for step in range(STEPS):
            given = batches(step, 1 if step == 3 else 2)
            sums = forward_backward(zero, given, count_tokens(given, device))
            losses.append(float(sums.mean))
            zero.step(1e-2)
    counters = torch._dynamo.utils.counters
    said = [str(warning.message) for warning in warned if "Dynamo" in str(warning.message)]
    said += counters["graph_break"]
    return losses, zero.full_parameters(), counters["stats"]["unique_graphs"], said


@pytest.mark.parametrize(
    ("layout", "dtype", "model", "backend"),
    [
        ({"recompute": "selective", "zero_stage": 0}, "fp32", RIVAL, "aot_eager"),
        ({"zero_stage": 2, "recompute": "full", "recompute_layers": 1}, "bf16", SMALL, "aot_eager"),
        ({"pipeline": 2}, "bf16", SMALL, "inductor"),
    ],
)  # fmt: skip
def test_compiled_layers_train_as_eager_ones(
    layout: dict[str, Any], dtype: str, model: dict[str, Any], backend: str
) -> None:
    arguments = layout, dtype, model
    ranks = layout.get("pipeline", 1)
    compiled = run_ranks(ranks, trained, *arguments, backend)
    eager = run_ranks(ranks, trained, *arguments, "")
    loss_bound, weight_bound = (1e-6, 1e-5) if dtype == "fp32" else (1e-3, 1e-2)
    for (losses, weights, graphs, said), plain in zip(compiled, eager, strict=True):
        assert losses == pytest.approx(plain[0], rel=loss_bound)
        for name, weight in plain[1].items():
            error = (weights[name].double() - weight.double()).norm() / weight.double().norm()
            assert error <= weight_bound, name
        assert graphs > plain[2] == 0
        assert said == []


def head(compiles: bool) -> list[Tensor]:
    from benchmarks.speed_calls import join
    from parallel.loss import head_loss, head_loss_operator

    join()
    torch.manual_seed(0)
    h, weight = torch.randn(40, 16, requires_grad=True), torch.randn(48, 16, requires_grad=True)
    given = h, weight, torch.randint(0, 40, (40,)), torch.rand(40), 40, 1e-3
    torch.library.opcheck(head_loss_operator, given)
    call = torch.compile(head_loss, fullgraph=True, backend="aot_eager") if compiles else head_loss
    total, by_token = call(*given)
    (2.5 * total).backward()
    assert h.grad is not None
    assert weight.grad is not None
    return [total.detach(), by_token, h.grad, weight.grad]


def test_the_head_compiles_to_the_same() -> None:
    found, expected = (run_ranks(1, head, compiles)[0] for compiles in (True, False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_projections_are_registered_as_pytorch_wants_them() -> None:
    from parallel.projections import joined_product

    u = torch.randn(6, 1, 8, requires_grad=True)
    weights = [torch.randn(n, 8, requires_grad=True) for n in (5, 16)]
    torch.library.opcheck(joined_product, (u, weights))
    found = joined_product(u, weights)
    assert found.shape == (6, 1, 32)
    expected = torch.cat([u @ w.t() for w in weights], -1)
    torch.testing.assert_close(found[..., :21], expected)
    grad = torch.randn(6, 1, 21)
    given = [u, *weights]
    for one, other in zip(
        torch.autograd.grad(found[..., :21], given, grad),
        torch.autograd.grad(expected, given, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
