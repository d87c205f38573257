"""Checkpoints written under one layout and read under another, and exported."""

from itertools import pairwise
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

# written by one, read and written again by the next, ...
CHAIN: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"zero_stage": 3}),
    (4, {"tensor": 2, "pipeline": 2}),
    (4, {"zero_stage": 2, "context": 2}),
    (2, {"pipeline": 2, "pipeline_split": [3, 1]}),
    (3, {"zero_stage": 0}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {"zero_stage": 1, "offload": "optimizer"}),
    (4, {"tensor": 2, "zero_stage": 3}),
    (1, {}),
]


def train(config: Config) -> None:
    from parallel.launch import launch_from_environment
    from pretrain.trainer import train as run

    run(config, launch_from_environment())


def through(config: Config, source: Path | None, target: Path, steps: int) -> list[float]:
    """Load `source`, train some steps, save to `target`; the losses."""
    from checkpoints_tools.saving import save_checkpoint
    from checkpoints_tools.sharded import load_checkpoint
    from parallel.compat import prepare_host
    from parallel.groups import from_rank_0, init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from pretrain.sources import keep_tokenizer, open_data
    from pretrain.trainer import Trainer

    device = prepare_host()
    init_distributed(launch_from_environment(), device)
    init_groups(config.parallel)
    data, validation = open_data(config)
    trainer = Trainer(config, data, validation, device)
    if source is not None:
        load_checkpoint(source, trainer.zero)
    batches = trainer.batches()
    losses = [trainer.train_step(batches)["loss"] for _ in range(steps)]
    batches.close()
    target.mkdir(exist_ok=True)
    tokenizer = from_rank_0(lambda: keep_tokenizer(data, target.parent))
    save_checkpoint(target, 1, trainer.zero, {}, tokenizer=tokenizer)
    return losses


def stored_tensors(step_dir: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp

    entries = dcp.FileSystemReader(step_dir).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(e.size) for n, e in entries.items() if not n.startswith("rng.")}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(step_dir), no_dist=True)
    return tensors


def test_state_survives_a_chain_of_layouts_bit_for_bit(tiny_data: Path, tmp_path: Path) -> None:
    def config(parallel: dict[str, Any]) -> Config:
        training = {"global_batch_size": 24, "micro_batch_size": 2}
        return tiny_config(tiny_data, tmp_path / "run", parallel=parallel, training=training)

    run_ranks(1, through, config({}), None, tmp_path / "0", 3)
    first = tmp_path / "0" / "step-00000001"
    expected = run_ranks(1, through, config({}), first, tmp_path / "x", 4)[0]
    for number, ((_, _), (world_size, parallel)) in enumerate(pairwise(CHAIN)):
        source, target = tmp_path / str(number), tmp_path / str(number + 1)
        run_ranks(world_size, through, config(parallel), source / first.name, target, 0)
        losses = run_ranks(
            world_size, through, config(parallel), source / first.name, tmp_path / "y", 4
        )[0]
        assert losses == pytest.approx(expected, rel=1e-4), parallel
    begin, end = stored_tensors(first), stored_tensors(target / first.name)
    assert begin.keys() == end.keys()
    for name, tensor in begin.items():
        assert torch.equal(tensor, end[name]), name
    assert losses == expected  # the last of the chain is the first layout again


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
