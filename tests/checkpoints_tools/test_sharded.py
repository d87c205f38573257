"""What is exported is what training and the float64 oracle compute."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ranks import run_ranks
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.model_folder import load_model
from pretrain.config import Config
from tests.oracle import model_logits
from tests.tiny import tiny_config


def train(config: Config) -> None:
    from parallel.launch import launch_from_environment
    from pretrain.job import train as run

    run(config, launch_from_environment())


def training_logits(config: Config, step_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    from checkpoints_tools.sharded import load_checkpoint
    from parallel.compat import prepare_host
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from pretrain.sources import open_data
    from pretrain.trainer import Trainer

    device = prepare_host()
    init_distributed(launch_from_environment(), device)
    init_groups(config.parallel)
    trainer = Trainer(config, open_data(config)[0], {}, device)
    load_checkpoint(step_dir, trainer.zero)
    positions = torch.arange(ids.shape[1])[None]
    cu_seqlens = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    with torch.no_grad():
        return trainer.zero.built.chunks[0].logits(ids, positions, cu_seqlens)[
            :, : config.model.vocab_size
        ]


@pytest.mark.parametrize(
    ("world_size", "parallel", "dtype"),
    [(1, {}, "fp32"), (4, {"tensor": 2, "pipeline": 2}, "fp32"), (2, {"zero_stage": 3}, "bf16")],
    ids=["one", "tensor2-pipeline2", "zero3-bf16"],
)
def test_export_equals_training_and_oracle(
    world_size: int, parallel: dict[str, Any], dtype: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        tiny_data, tmp_path / "run", parallel=parallel, training={"steps": 5, "dtype": dtype},
        model={"vocab_size": 301},
    )  # fmt: skip
    run_ranks(world_size, train, config)
    step_dir = tmp_path / "run/checkpoints/step-00000005"
    assert (
        export_checkpoint(tmp_path / "run", tmp_path / "model")
        == config.model.num_params()["total"]
    )
    model = load_model(tmp_path / "model")
    ids = torch.randint(0, 300, (1, 50), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exported = model(ids)[0]
    one = tiny_config(tiny_data, tmp_path / "one", model={"vocab_size": 301})
    trained = run_ranks(1, training_logits, one, step_dir, ids)[0]
    assert (exported - trained).norm() < 1e-5 * trained.norm()
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    expected = model_logits(tensors, vars(model.config), ids[0].numpy())
    assert np.linalg.norm(exported.numpy() - expected) < 1e-5 * np.linalg.norm(expected)
