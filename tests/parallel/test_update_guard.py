"""Refused steps change nothing, whatever DeepSpeed asks or does not ask before an update."""

from typing import Any

import torch

from benchmarks.parity import MODEL, synthetic_batch
from benchmarks.ranks import run_ranks

LAYOUTS = [
    (torch.float32, {"zero_stage": 1}),
    (torch.bfloat16, {"zero_stage": 0}),
    (torch.bfloat16, {"zero_stage": 1}),
    (torch.bfloat16, {"zero_stage": 2}),
    (torch.bfloat16, {"zero_stage": 2, "offload": "optimizer"}),
    (torch.float32, {"zero_stage": 3}),
]


def two_optimizers(dtype: torch.dtype, parallel: dict[str, Any]) -> list[Any]:
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.zero import ZeroOptimizer

    layout, device = ParallelConfig(**parallel), prepare_host()
    return [
        ZeroOptimizer(
            build_stage(
                ModelConfig(**MODEL), layout, seq_len=64, dtype=dtype, seed=5, deterministic=False,
                device=device,
            ),
            layout, lr=0.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip_grad_norm=1.0,
        )
        for _ in range(2)
    ]  # fmt: skip


def join() -> None:
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment

    init_distributed(launch_from_environment(), prepare_host())
    init_groups(ParallelConfig())


def step(zero: Any, refused: bool, tokens: float = 1000.0) -> tuple[bool, bool]:
    """Whether an update was reported, and whether any state has changed."""
    from parallel.context import local_batch
    from parallel.schedule import forward_backward

    def state() -> list[torch.Tensor]:
        parts = [(f.weight, f.exp_avg, f.exp_avg_sq) for f in zero.fragments()]
        own = [part.clone() for fragment in parts for part in fragment]
        return [*own, *(p.detach().clone() for _, p in zero.built.named_parameters())]

    batch = local_batch(synthetic_batch(0, range(1), True), torch.device("cpu"))
    forward_backward(zero, [batch], torch.tensor(tokens, dtype=torch.float64))
    before, count = state(), zero.adam_step()
    applied = zero.step(1e-2, refused=refused).applied
    same = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    return applied, not same or zero.adam_step() != count


def refused_steps() -> list[tuple[str, Any]]:
    """What is not as it should be."""
    import importlib

    join()
    wrong: list[tuple[str, Any]] = []
    for dtype, parallel in LAYOUTS:
        first, second = two_optimizers(dtype, parallel)
        for zero, refused, tokens in (
            (first, True, 1000.0),
            (second, False, 1000.0),
            (first, False, 1000.0),
            (second, True, 1000.0),
            (first, False, 1e-300),  # gradients overflow
            (first, False, 1000.0),
        ):
            expected = not refused and tokens > 1
            if (seen := step(zero, refused, tokens)) != (expected, expected):
                wrong.append((f"{dtype} {parallel} refused {refused}, {tokens} tokens", seen))
    # a release that asks nobody whether the norm is valid
    for name in ("bf16_optimizer", "zero.stage_1_and_2", "zero.stage3"):
        module: Any = importlib.import_module(f"deepspeed.runtime.{name}")
        module.is_invalid_grad_norm = lambda _: False
    for dtype, parallel in LAYOUTS[2:4]:
        first, _ = two_optimizers(dtype, parallel)
        for refused, tokens in ((True, 1000.0), (False, 1e-300)):
            if (seen := step(first, refused, tokens)) != (False, False):
                wrong.append((f"{dtype} {parallel} unasked", seen))
    return wrong


def test_refused_step_changes_nothing_whatever_deepspeed_asks() -> None:
    """In a process with two optimizers, each with its own steps."""
    assert run_ranks(1, refused_steps) == [[]]


def engine_that_updates_elsewhere() -> list[str]:
    from parallel.update_guard import EngineError, UpdateGuard

    join()
    messages = []
    for dtype, parallel in LAYOUTS[1:3]:
        zero, other = two_optimizers(dtype, parallel)
        zero.engine.step = lambda: None
        for act in (
            lambda zero=zero: step(zero, False),
            lambda zero=zero, other=other: UpdateGuard(other.adam, zero.optimizer),
        ):
            try:
                act()
            except EngineError as error:
                messages.append(str(error))
    return messages


def test_engine_that_does_not_use_the_optimizer_it_was_given_is_found() -> None:
    (messages,) = run_ranks(1, engine_that_updates_elsewhere)
    assert len(messages) == 4
    assert all("updates of bad steps could not be left out" in message for message in messages)
