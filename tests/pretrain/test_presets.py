"""The presets in configs/: they load, fit their processes, and have the sizes their names say."""

from pathlib import Path

import pytest

from pretrain.config import Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("*.toml"))
PAPER = {"320m.toml": (2**20, 3e-4), "1.3b.toml": (2**21, 2e-4)}  # tokens per step, learning rate
WORLD_SIZES = {
    "demo.toml": [1, 2],
    "320m.toml": [1, 2, 4, 8, 16, 32, 64],
    "1.3b.toml": [8, 16, 32, 64, 128],
    "7b.toml": [8, 16, 32, 64, 128, 256, 512, 1024],
}


def load(name: str) -> Config:
    return load_config(CONFIGS / name)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_loads_and_fits_the_processes_it_names(name: str) -> None:
    config = load(name)
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    for world_size in WORLD_SIZES[name]:
        assert config.data_parallel(world_size) == world_size // model_ranks


@pytest.mark.parametrize(
    ("name", "params"), [("320m.toml", 320e6), ("1.3b.toml", 1.3e9), ("7b.toml", 7e9)]
)
def test_preset_has_the_size_of_its_name(name: str, params: float) -> None:
    config = load(name)
    assert config.model.num_params()["total"] == pytest.approx(params, rel=0.01)
    assert config.model.intermediate_size % 128 == 0
    assert config.training.tokens == pytest.approx(20 * params, rel=0.01)


@pytest.mark.parametrize("name", PAPER)
def test_preset_trains_as_the_papers_table_4(name: str) -> None:
    config = load(name)
    tokens_per_step, lr = PAPER[name]
    assert config.phases[0].tokens_per_step == tokens_per_step
    assert config.optimizer.lr == lr
    assert config.optimizer.betas == [0.9, 0.999]
    assert config.optimizer.weight_decay == 0.01
    assert (config.optimizer.schedule, config.optimizer.warmup_fraction) == ("cosine", 0.1)
    assert config.optimizer.min_lr_ratio == 0.1
    model = config.model
    assert (model.head_dim, model.state_dim, model.chunk_size) == (64, 128, 256)
    assert model.num_heads * model.head_dim == model.hidden_size
    assert (model.vocab_size, model.tie_word_embeddings) == (50280, True)
