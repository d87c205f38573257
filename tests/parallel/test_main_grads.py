"""Float32 sums of gradients: those of DeepSpeed's own hooks, its flags included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parity import MODEL, synthetic_batch
from benchmarks.ranks import run_ranks

MICRO_BATCHES = 3
UNTIED = MODEL | {"tie_word_embeddings": False}
# summed before they are rounded, where DeepSpeed's hooks get them rounded
HEADS = {"lm_head.weight", "model.word_embed.weight"}


class Sums:
    """What a step leaves in BF16_Optimizer: by parameter, its sum and its flags."""

    def __init__(self, zero: Any) -> None:
        optimizer = zero.optimizer
        names = {id(parameter): name for name, parameter in zero.built.named_parameters()}
        self.totals: dict[str, Tensor] = {}
        self.flags: dict[str, tuple[bool, bool, bool]] = {}
        for group, parameters in enumerate(optimizer.bf16_groups):
            for index, parameter in enumerate(parameters):
                name, total = names[id(parameter)], optimizer.fp32_groups_gradients[group][index]
                self.totals[name] = total.clone()
                arrived = getattr(parameter, "_hp_grad", None)
                self.flags[name] = (
                    optimizer.fp32_groups_has_gradients[group][index],
                    arrived is not None and arrived.data_ptr() == total.data_ptr(),
                    parameter.grad is None,
                )


def sums_of_steps(
    parallel: dict[str, Any], model: dict[str, Any], hooks: str, unused: bool, joined: bool
) -> tuple[list[Sums], list[float]]:
    """After the micro-batches of each of three steps, the second of which is refused; the norms.

    hooks: whose, "ours" or "deepspeed"; joined: projections share products; unused: layer 0's mixer
    is passed over in one micro-batch of a step, and layer 1's feed-forward in all of them.
    """
    import parallel.zero as zero_module
    from parallel import projections
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import forward_backward

    projections.JOINED_BYTES *= joined
    if hooks == "deepspeed":
        zero_module.MainGrads = lambda optimizer: None  # type: ignore[assignment, misc]
        zero_module.ZeroOptimizer._accumulated_gradient = (  # type: ignore[method-assign]
            lambda self, parameter: parameter._hp_grad  # type: ignore[attr-defined]
        )
    launch, device, layout = launch_from_environment(), prepare_host(), ParallelConfig(**parallel)
    init_distributed(launch, device)
    init_groups(layout)
    built = build_stage(
        ModelConfig(**model), layout, seq_len=64, dtype=torch.bfloat16, seed=5,
        deterministic=False, device=device,
    )  # fmt: skip
    zero = zero_module.ZeroOptimizer(
        built, layout, lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip_grad_norm=0.1
    )
    if unused and built.chunks[0].first:
        _pass_over_layers(built.chunks[0].model.layers)
    found, norms = [], []
    tokens = torch.tensor(100.0, dtype=torch.float64)
    for step in range(3):
        rows = range(MICRO_BATCHES)
        batches = [
            local_batch(synthetic_batch(step, range(at, at + 1), True), device) for at in rows
        ]
        forward_backward(zero, batches, tokens)
        found.append(Sums(zero))
        norms.append(zero.step(1e-2, refused=step == 1).grad_norm)
        for flat in zero.optimizer.fp32_groups_gradients_flat:
            assert not flat.any()
        assert not any(map(any, zero.optimizer.fp32_groups_has_gradients))
    return found, norms


def _pass_over_layers(layers: nn.ModuleDict) -> None:
    calls = 0
    mixer, feed_forward = layers["0"].ssd, layers["1"].feed_forward
    forward = mixer.forward

    def maybe(h: Tensor, positions: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return h if calls % MICRO_BATCHES == 2 else forward(h, positions)

    mixer.forward = maybe
    feed_forward.forward = lambda h: h


@pytest.mark.parametrize(
    ("ranks", "parallel", "model", "unused", "joined"),
    [
        (1, {}, UNTIED, False, True),
        (1, {"zero_stage": 0, "recompute": "full"}, UNTIED, False, False),
        (2, {"tensor": 2}, MODEL, True, False),
        (2, {"tensor": 2, "sequence": False}, MODEL, False, True),
        (2, {"pipeline": 2}, MODEL, True, True),
    ],
    ids=str,
)
def test_sums_and_flags_are_those_of_deepspeeds_hooks(
    ranks: int, parallel: dict[str, Any], model: dict[str, Any], unused: bool, joined: bool
) -> None:
    ours = run_ranks(ranks, sums_of_steps, parallel, model, "ours", unused, joined)
    theirs = run_ranks(ranks, sums_of_steps, parallel, model, "deepspeed", unused, joined)
    for (mine, norms), (stock, stock_norms) in zip(ours, theirs, strict=True):
        assert norms == pytest.approx(stock_norms, rel=2e-3)
        assert [sums.flags for sums in mine] == [sums.flags for sums in stock]
        # before the first update the weights are the same ones
        for name, total in stock[0].totals.items():
            if name in HEADS:
                error = (mine[0].totals[name] - total).norm() / total.norm()
                assert error < 1e-2, name
            else:
                assert torch.equal(mine[0].totals[name], total), name
    if unused:
        flags = ours[0][0][0].flags
        assert flags["model.layers.0.ssd.x_proj.weight"] == (True, True, True)
        assert flags["model.layers.1.feed_forward.up_proj.weight"] == (False, False, True)


# -- numerics --------------------------------------------------------------------------------------


class Owner:
    def __init__(self) -> None:
        self.marked: list[Tensor] = []

    def mark(self, parameter: Tensor) -> None:
        self.marked.append(parameter)


def with_main_grad(weight: Tensor, owner: Owner, total: Tensor | None = None) -> Any:
    parameter: Any = nn.Parameter(weight)
    parameter.main_grad = torch.zeros_like(weight, dtype=torch.float32) if total is None else total
    parameter.main_grad_owner = owner
    return parameter


def head_errors(micro_batches: int) -> tuple[float, float, bool]:
    """Errors of the sum of the head's gradients against float64: ours, and as autograd has it."""
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.loss import head_loss

    init_distributed(launch_from_environment(), prepare_host())
    init_groups(ParallelConfig())
    torch.manual_seed(3)
    owner, scale = Owner(), torch.tensor(1 / 300)
    stock = nn.Parameter(torch.randn(80, 32).bfloat16())
    summed = with_main_grad(stock.detach().clone(), owner)
    hooked, exact = torch.zeros(80, 32), torch.zeros(80, 32, dtype=torch.float64)
    for _ in range(micro_batches):
        h = torch.randn(40, 32).bfloat16().requires_grad_()
        labels, mask = torch.randint(80, (40,)), torch.ones(40)
        for weight in (stock, summed):
            (head_loss(h, weight, labels, mask, 80)[0] * scale).backward()
        assert stock.grad is not None
        assert summed.grad is None
        hooked += stock.grad.float()
        stock.grad = None
        weight = stock.detach().double().requires_grad_()
        logits = h.detach().double() @ weight.t()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") * scale.double()
        exact += torch.autograd.grad(loss, weight)[0]
    errors = [float((total - exact).norm() / exact.norm()) for total in (summed.main_grad, hooked)]
    return errors[0], errors[1], len(owner.marked) == micro_batches


@pytest.mark.parametrize("micro_batches", [1, 16])
def test_the_heads_sum_is_no_farther_from_float64(micro_batches: int) -> None:
    ((ours, hooked, marked),) = run_ranks(1, head_errors, micro_batches)
    assert ours < 1.02 * hooked
    assert hooked < 1e-2
    assert marked


# -- where sums lie --------------------------------------------------------------------------------


@pytest.mark.parametrize("adjacent", [True, False])
def test_a_product_adds_to_sums_wherever_they_lie(
    adjacent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import parallel.projections as projections

    calls = []
    add_product = projections.add_product
    monkeypatch.setattr(
        projections,
        "add_product",
        lambda total, a, b: calls.append(tuple(total.shape)) or add_product(total, a, b),
    )
    sizes, owner = [3, 1, 2], Owner()
    flat, totals = torch.randn(6, 5).bfloat16(), torch.randn(6, 5)
    before = totals.clone()
    weights = [
        with_main_grad(part if adjacent else part.clone(), owner, total)
        for part, total in zip(flat.split(sizes), totals.split(sizes), strict=True)
    ]
    g, u = torch.randn(7, 6).bfloat16(), torch.randn(7, 5).bfloat16()
    assert projections._weight_gradients(weights, g, u) == [None] * 3
    assert torch.equal(totals, before + (g.t() @ u).float())
    assert calls == ([(6, 5)] if adjacent else [(3, 5), (1, 5), (2, 5)])
    assert all(a is b for a, b in zip(owner.marked, weights, strict=True))


def test_weights_without_sums_get_their_gradients() -> None:
    from parallel.projections import _weight_gradients

    weights = [nn.Parameter(torch.randn(size, 5)) for size in (3, 2)]
    g, u = torch.randn(7, 5), torch.randn(7, 5)
    found = [gradient for gradient in _weight_gradients(weights, g, u) if gradient is not None]
    assert torch.equal(torch.cat(found), g.t() @ u)


def sums_of_layout(parallel: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether gradients bypass autograd."""
    from tests.parallel.test_update import built_zero

    zero = built_zero(parallel, dtype, MODEL)
    return zero.main_grads is not None and all(
        hasattr(parameter, "main_grad") for _, parameter in zero.built.named_parameters()
    )


@pytest.mark.parametrize(
    ("parallel", "dtype", "expected"),
    [
        ({"zero_stage": 0}, torch.bfloat16, True),
        ({"zero_stage": 1}, torch.bfloat16, True),
        ({"zero_stage": 1}, torch.float32, False),
        ({"zero_stage": 2}, torch.bfloat16, False),
        ({"zero_stage": 3}, torch.bfloat16, False),
        ({"zero_stage": 1, "offload": "optimizer"}, torch.bfloat16, False),
    ],
    ids=str,
)
def test_layouts_with_float32_sums(
    parallel: dict[str, Any], dtype: torch.dtype, expected: bool
) -> None:
    assert run_ranks(1, sums_of_layout, parallel, dtype) == [expected]


def gradients_of_a_step() -> dict[str, Tensor]:
    """Of a data-parallel rank."""
    from tests.parallel.test_update import built_zero

    zero = built_zero({}, torch.bfloat16, MODEL)
    found: dict[str, Tensor] = zero.full_gradients()
    return found
