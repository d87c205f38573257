"""Norms, update ratios and decays: the same on every layout, and what they say they are."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.ranks import run_ranks
from parallel.config import ModelConfig
from parallel.vitals import KINDS, kind_of
from pretrain.config import Config
from tests.tiny import tiny_config

Seen = dict[str, float]
DECAY = {"weight_decay": 10.0}  # as much of an update as Adam's part


def step_with_vitals(config: Config) -> tuple[Seen, Seen]:
    """Of the second of two steps: what Vitals saw, and the same from whole tensors."""
    from benchmarks.trainers import open_trainer
    from parallel.context import local_batch
    from parallel.schedule import count_tokens, forward_backward
    from parallel.vitals import Vitals

    trainer = open_trainer(config)
    zero, reading = trainer.zero, trainer.batches()
    for step in range(2):
        read = [local_batch(batch, trainer.device) for batch in reading.next_step()]
        vitals = Vitals(zero)
        with vitals.watching():
            forward_backward(zero, read, count_tokens(read, trainer.device))
        vitals.gradients()
        gradients, before = zero.full_gradients(), zero.full_parameters()
        zero.step(1e-2)
        if step == 0:
            vitals.collect(1e-2, True)
    after = zero.full_parameters()
    reading.close()
    whole: Seen = {}
    for kind in KINDS:
        names = [name for name in after if kind_of(name) == kind]

        def norm(tensors: dict[str, torch.Tensor], names: list[str] = names) -> float:
            return math.sqrt(sum(float(tensors[n].double().square().sum()) for n in names))

        whole[f"grad_norm_{kind}"] = norm(gradients)
        whole[f"weight_norm_{kind}"] = norm(after)
        moved = {name: after[name] - before[name] for name in names}
        whole[f"update_ratio_{kind}"] = norm(moved) / (norm(after) or 1)
    return vitals.collect(1e-2, True), whole


@pytest.fixture(scope="module")
def one(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Seen]:
    config = tiny_config(tiny_data, tmp_path_factory.mktemp("one"), optimizer=DECAY)
    return run_ranks(1, step_with_vitals, config)[0]


def test_they_are_what_they_say(one: tuple[Seen, Seen]) -> None:
    seen, whole = one
    for name, value in whole.items():
        assert seen[name] == pytest.approx(value, rel=2e-3), name
    assert 0 < seen["ssd_decay"] < 1
    assert 0 <= seen["ssd_long_memory"] <= 1
    # Δ begins between 0.001 and 0.1, and the projection adds little to it
    assert 0.001 < seen["ssd_delta"] < 0.1
    assert all(seen[f"activation_rms_{kind}"] > 0 for kind in KINDS[:3])


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (4, {"tensor": 2, "pipeline": 2}),
        (4, {"context": 2, "zero_stage": 3}),
        (2, {"zero_stage": 0}),
        (2, {"zero_stage": 2, "recompute": "full"}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"tensor": 2, "sequence": False}),
    ],
    ids=str,
)
def test_layout_does_not_change_them(
    ranks: int, parallel: dict[str, Any], one: tuple[Seen, Seen], tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_data, tmp_path, parallel=parallel, optimizer=DECAY)
    for seen, _ in run_ranks(ranks, step_with_vitals, config):
        assert seen == pytest.approx(one[0], rel=2e-3)


def test_every_parameter_has_a_kind() -> None:
    model = ModelConfig(num_layers=2, attn_layer_period=2, attn_layer_offset=1)
    from checkpoints_tools.source import parameter_shapes, single_gpu_config

    state = {"config": {"model": model.model_dump()}, "eod_id": 0, "pad_id": 0}
    kinds = {kind_of(name) for name in parameter_shapes(single_gpu_config(state, "fp32"))}
    assert kinds == set(KINDS)


def test_softplus_is_that_of_the_scan() -> None:
    """The scan's own Δ is softplus(dt + bias): ssd_delta is the mean of it."""
    from parallel.vitals import Vitals

    class Nothing:
        class built:
            chunks: tuple[()] = ()

    vitals = Vitals(Nothing())  # type: ignore[arg-type]
    dt, bias, A = torch.randn(2, 5, 3), torch.randn(3), -torch.rand(3)
    vitals._scan(dt, bias, A)
    assert float(vitals._sums["delta"]) == pytest.approx(float(F.softplus(dt + bias).mean()))
