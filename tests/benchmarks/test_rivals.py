"""Rivals: as many parameters, and the configurations that are shipped of them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rivals import DECAY_ALONE, RIVALS, TOLERANCE, TRANSXSSM, Rival, rival_model
from checkpoints_tools.source import parameter_shapes, single_gpu_config
from parallel.config import ModelConfig
from pretrain.config import ConfigError, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = dict(
    zip(("attention", "ssd", "attention_rope", "convolution", "decay_alone"),
        (*RIVALS[1:], DECAY_ALONE), strict=True)
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    heads=st.sampled_from([4, 8, 16]), kv=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([1, 4]),
    state=st.sampled_from([16, 64, 128]), layers=st.integers(8, 32), wide=st.integers(2, 8),
)  # fmt: skip
def test_rivals_are_as_large(
    heads: int, kv: int, groups: int, state: int, layers: int, wide: int
) -> None:
    model = ModelConfig(
        hidden_size=64 * heads, num_heads=heads, num_kv_heads=kv, ssd_groups=groups,
        state_dim=state, num_layers=layers, intermediate_size=64 * heads * wide,
    )  # fmt: skip
    for rival in (*RIVALS, DECAY_ALONE):
        found = rival_model(rival, model)
        # counted from the tensors themselves
        state_ = {"config": {"model": found.model_dump()}, "eod_id": 0, "pad_id": 0}
        shapes = parameter_shapes(single_gpu_config(state_, "fp32"))
        total = 0
        for shape in shapes.values():
            size = 1
            for length in shape:
                size *= length
            total += size
        assert abs(total / model.num_params()["total"] - 1) <= TOLERANCE
        attends = [found.is_attention(layer) for layer in range(layers)]
        if rival.layers == "hybrid":
            assert attends == [model.is_attention(layer) for layer in range(layers)]
        else:
            assert set(attends) == {rival.layers == "attention"}
    assert rival_model(TRANSXSSM, model) == model


def test_what_cannot_be_as_large() -> None:
    model = ModelConfig(state_dim=256, intermediate_size=8, num_layers=8)
    thick = Rival("thick", "hybrid", "none", conv_width=256)
    with pytest.raises(ValueError, match="no feed-forward is left of it"):
        rival_model(thick, model)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_the_rivals(name: str) -> None:
    ours = load_config(CONFIGS / "320m.toml", [])
    theirs = load_config(CONFIGS / f"rivals/{name}.toml", [])
    assert theirs.model == rival_model(SHIPPED[name], ours.model)
    for section in ("parallel", "optimizer", "training", "checkpoint"):
        assert getattr(theirs, section) == getattr(ours, section)
    assert theirs.logging.run_dir not in (ours.logging.run_dir, "runs/demo")


def test_convolution_is_refused_where_tokens_are_split() -> None:
    with pytest.raises(ConfigError, match="ssd_conv_width"):
        load_config(CONFIGS / "rivals/convolution.toml", ["--parallel.context", "2"])
