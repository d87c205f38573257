"""Every layout trains like one process: the losses, and every parameter's gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity import assemble
from benchmarks.ranks import run_ranks
from parallel.params import ParamInfo
from pretrain.config import Config
from tests.tiny import tiny_config

STEPS = 8  # python -m benchmarks.parity makes more
# python -m benchmarks.parity has all
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pipeline2-recompute": (2, {"pipeline": 2, "recompute": "full", "pipeline_split": [1, 3]}),
    "data2-zero3-selective": (2, {"zero_stage": 3, "recompute": "selective"}),
    "context4-zero3": (4, {"context": 4, "zero_stage": 3}),
    # two heads on each tensor-parallel rank, which four ranks cannot share out: a ring
    "tensor2-context4-recompute": (8, {"tensor": 2, "context": 4, "recompute": "full"}),
    "context2-pipeline2": (4, {"context": 2, "pipeline": 2}),
    "data2-zero0": (2, {"zero_stage": 0}),
    "data2-offload": (2, {"zero_stage": 2, "offload": "optimizer"}),
    "pipeline2-virtual2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tensor2-data2-zero3": (4, {"tensor": 2, "zero_stage": 3}),
}
Trace = tuple[list[float], list[float], dict[str, tuple[ParamInfo, torch.Tensor]]]


def train_trace(config: Config, steps: int) -> Trace:
    """Losses and gradient norms of some steps, and this rank's gradients of the first."""
    from parallel.compat import prepare_host
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.schedule import count_tokens, forward_backward
    from pretrain.sources import open_data
    from pretrain.trainer import Trainer

    launch, device = launch_from_environment(), prepare_host()
    init_distributed(launch, device)
    init_groups(config.parallel)
    data, validation = open_data(config)
    trainer = Trainer(config, data, validation, device)
    reading = trainer.batches()
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        batches = [local_batch(batch, device) for batch in reading.next_step()]
        losses.append(
            float(forward_backward(trainer.zero, batches, count_tokens(batches, device)).mean)
        )
        if step == 0:
            for name, gradient in trainer.zero.full_gradients().items():
                gradients[name] = (trainer.zero.infos[name], gradient)
        norms.append(trainer.zero.step(config.optimizer.lr).grad_norm)
    reading.close()
    return losses, norms, gradients


@pytest.fixture(scope="module")
def single(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    config = tiny_config(tiny_data, tmp_path_factory.mktemp("single"))
    return run_ranks(1, train_trace, config, STEPS)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_reproduces_single_process(
    name: str, single: Trace, tiny_data: Path, tmp_path: Path
) -> None:
    world_size, parallel = LAYOUTS[name]
    config = tiny_config(tiny_data, tmp_path, parallel=parallel)
    traces = run_ranks(world_size, train_trace, config, STEPS)
    for losses, norms, _ in traces:  # known on every rank
        assert losses == pytest.approx(single[0], rel=1e-4)
        assert norms == pytest.approx(single[1], rel=1e-4)
    expected, found = (assemble([trace[2] for trace in t]) for t in ([single], traces))
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        error = (found[parameter] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{parameter}: gradient differs by {error:.1e}"


def test_z_loss_is_the_same_in_every_layout(tiny_data: Path, tmp_path: Path) -> None:
    """Its gradient in all parameters; the loss reported is without it, and so at first the same."""
    fields = {"z_loss": 0.1}
    one = run_ranks(1, train_trace, tiny_config(tiny_data, tmp_path, training=fields), 3)
    plain = run_ranks(1, train_trace, tiny_config(tiny_data, tmp_path), 3)
    assert one[0][0][0] == plain[0][0][0]
    assert abs(one[0][1][0] / plain[0][1][0] - 1) > 1e-2
    expected = assemble([trace[2] for trace in one])
    for ranks, layout in (
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": False}),
        (8, {"tensor": 2, "pipeline": 2, "context": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"zero_stage": 3}),
    ):
        config = tiny_config(tiny_data, tmp_path, training=fields, parallel=layout)
        traces = run_ranks(ranks, train_trace, config, 3)
        for losses, norms, _ in traces:
            assert losses == pytest.approx(one[0][0], rel=1e-4), layout
            assert norms == pytest.approx(one[0][1], rel=1e-4), layout
        found = assemble([trace[2] for trace in traces])
        for parameter, gradient in expected.items():
            error = (found[parameter] - gradient).norm() / gradient.norm()
            assert error < 1e-4, (layout, parameter)


def test_bf16_follows_float32(single: Trace, tiny_data: Path, tmp_path: Path) -> None:
    for parallel in ({"zero_stage": 1}, {"zero_stage": 3}, {"pipeline": 2}, {"tensor": 2}):
        config = tiny_config(tiny_data, tmp_path, parallel=parallel, training={"dtype": "bf16"})
        losses = run_ranks(2, train_trace, config, STEPS)[0][0]
        assert losses == pytest.approx(single[0], rel=1e-2), parallel


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": False}, {"vocab_size": 301},
                                    {"ssd_skip": True, "ssd_conv_width": 4}, {"rope": "none"}],
                         ids=str)  # fmt: skip
def test_model_variants_split(fields: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    fields = fields | {"init_std": 0.3}  # so that every parameter counts in the gradient norm
    one = run_ranks(1, train_trace, tiny_config(tiny_data, tmp_path, model=fields), 3)
    layout = {"tensor": 2, "pipeline": 2}
    config = tiny_config(tiny_data, tmp_path, model=fields, parallel=layout)
    traces = run_ranks(4, train_trace, config, 3)
    assert traces[0][0] == pytest.approx(one[0][0], rel=1e-4)
    assert traces[0][1] == pytest.approx(one[0][1], rel=1e-4)
    expected, found = (assemble([trace[2] for trace in t]) for t in (one, traces))
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).norm() < 1e-4 * gradient.norm(), parameter
