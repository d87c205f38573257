"""Initial weights: their distributions, and the same numbers under every layout."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity import assemble
from benchmarks.ranks import run_ranks
from parallel.config import ModelConfig
from parallel.init import initial_tensor
from parallel.params import ParamInfo
from tests.tiny import MODEL

FIELDS: dict[str, Any] = {
    "vocab_size": 301, "init_std": 0.05, "num_layers": 6, "ssd_skip": True, "ssd_conv_width": 3,
    "tie_word_embeddings": False,
}  # fmt: skip
PROJECTIONS = ["model.word_embed.weight", "lm_head.weight"] + [
    f"model.layers.3.{kind}_proj.weight"
    for kind in (
        "attn.q", "attn.k", "attn.v", "ssd.x", "ssd.b", "ssd.c", "ssd.dt",
        "feed_forward.gate", "feed_forward.up",
    )
]  # fmt: skip
OUTPUTS = ("attn.o_proj.weight", "ssd.out_proj.weight", "feed_forward.down_proj.weight")


def draw(name: str, *shape: int, seed: int = 1) -> Tensor:
    return initial_tensor(name, shape, ModelConfig(**(MODEL | FIELDS)), seed)


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """By the largest distance of its distribution from the uniform one (Kolmogorov-Smirnov)."""
    ranks = (torch.arange(values.numel()) + 0.5) / values.numel()
    distance = ((values.flatten().double().sort().values - low) / (high - low) - ranks).abs().max()
    assert distance < 1.8 / math.sqrt(values.numel())


def assert_normal(values: Tensor, std: float) -> None:
    standard = values.flatten().double() / std
    assert_uniform(0.5 * (1 + torch.erf(standard / math.sqrt(2))), 0, 1)
    assert standard.abs().max() > 3.5  # nothing is cut off


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_and_embeddings_are_normal(name: str) -> None:
    assert_normal(draw(name, 200, 100), 0.05)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_output_projections_are_smaller_by_the_root_of_twice_the_layers(kind: str) -> None:
    assert_normal(draw(f"model.layers.0.{kind}", 200, 100), 0.05 / math.sqrt(2 * 6))


def test_decay_rates_and_steps() -> None:
    assert_uniform(draw("model.layers.0.ssd.A_log", 20_000).exp(), 1, 16)
    steps = torch.nn.functional.softplus(draw("model.layers.0.ssd.dt_bias", 20_000).double())
    assert_uniform(steps.log(), math.log(1e-3), math.log(1e-1))


def test_other_vectors_are_one_and_convolutions_uniform() -> None:
    for name in ("ssd.D", "pre_sequence_layernorm.weight", "post_state_residual.weight"):
        assert torch.equal(draw(f"model.layers.0.{name}", 50), torch.ones(50))
    bound = 1 / math.sqrt(3)
    assert_uniform(draw("model.layers.0.ssd.conv.weight", 5000, 1, 3), -bound, bound)


def test_every_name_and_seed_has_numbers_of_its_own() -> None:
    """Lists of correlated tensors would show as large products."""
    names = [
        f"model.layers.{layer}.attn.{kind}_proj.weight" for layer in (0, 1, 10) for kind in "qk"
    ]
    drawn = [draw(name, 64, 64, seed=seed) for name in names for seed in (1, 2)]
    flat = torch.stack([tensor.flatten() / tensor.norm() for tensor in drawn])
    assert ((flat @ flat.T) - torch.eye(len(drawn))).abs().max() < 0.1
    assert torch.equal(draw(names[0], 64, 64), draw(names[0], 64, 64))


def built_parameters(parallel: dict[str, Any]) -> dict[str, tuple[ParamInfo, Tensor]]:
    """This rank's, and what they are globally; padding rows of the vocabulary must be zero."""
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment

    device, layout = prepare_host(), ParallelConfig(**parallel)
    init_distributed(launch_from_environment(), device)
    init_groups(layout)
    built = build_stage(
        ModelConfig(**(MODEL | FIELDS)), layout, seq_len=64, dtype=torch.float32, seed=9,
        deterministic=False, device=device,
    )  # fmt: skip
    found = {}
    for name, parameter in built.named_parameters():
        info, tensor = built.infos[name], parameter.detach().clone()
        found[name] = (info, tensor)
        if name in ("model.word_embed.weight", "lm_head.weight"):
            filled = sum(part.length for part in info.ranges)
            assert not tensor[filled:].any()
    return found


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
                         ids=str)  # fmt: skip
def test_a_built_model_has_these_weights_whatever_the_layout(parallel: dict[str, Any]) -> None:
    whole = assemble(run_ranks(2, built_parameters, parallel))
    assert len([name for name in whole if name.endswith(OUTPUTS)]) == 12
    for name, tensor in whole.items():
        assert torch.equal(tensor, draw(name, *tensor.shape, seed=9)), name
