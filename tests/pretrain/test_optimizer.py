"""The command's training against AdamW written out, with no optimizer field at its default.

The reference shares the initial weights and the order of samples with the run, nothing else: the
single-GPU model takes a document a row, and clipping, decay, moments and schedule stand below.
"""

import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_tools.export import single_gpu_config
from checkpoints_tools.single_gpu import TransXSSM
from data_pipeline.blend import Blend
from data_pipeline.dataset import PackedDataset
from data_pipeline.packing import Sample
from parallel.init import initial_tensor
from pretrain.config import Config, load_config
from pretrain.sections import OptimizerConfig
from tests.pretrain.command import read_metrics, run_command, succeed, write_config
from tests.pretrain.test_run import die_after_save

STEPS, BATCH, SEED = 12, 8, 77
OPTIMIZER: dict[str, Any] = {
    "lr": 4e-3,
    "min_lr_ratio": 0.3,
    "betas": [0.7, 0.85],
    "eps": 2e-3,
    "weight_decay": 0.6,
    "clip_grad_norm": 1.25,
    "schedule": "wsd",
    "warmup_fraction": 0.3,
    "decay_fraction": 0.4,
}


def mean_loss(model: TransXSSM, samples: list[Sample]) -> Tensor:
    """Per predicted token; no document sees another, and padding counts nowhere."""
    documents = []
    for sample in samples:
        pieces = np.split(sample.tokens.astype(np.int64), sample.doc_lens.cumsum()[:-1])
        documents += pieces[: len(pieces) - bool(sample.num_pad)]
    width = max(len(document) for document in documents)
    ids, labels = torch.zeros(2, len(documents), width - 1, dtype=torch.int64)
    for row, document in enumerate(documents):
        ids[row, : len(document) - 1] = torch.from_numpy(document[:-1])
        labels[row, len(document) - 1 :] = -1
        labels[row, : len(document) - 1] = torch.from_numpy(document[1:])
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-1)


def rate(step: int) -> float:
    """Of the update that makes step `step` of STEPS, the first being 1."""
    done, peak = step / STEPS, OPTIMIZER["lr"]
    if done < 0.3:
        return peak * done / 0.3
    if done <= 0.6:
        return peak
    return peak * (1 - 0.7 * (done - 0.6) / 0.4)


def train_by_hand(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]:
    """Weights before and after, and (loss, gradient norm, rate) of every step."""
    state = {"config": {"model": config.model.model_dump()}, "eod_id": 0, "pad_id": 1}
    model = TransXSSM(single_gpu_config(state, "fp32"))
    data = Blend([PackedDataset(Path(config.data.train))], seed=config.data.seed)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(initial_tensor(name, tuple(weight.shape), config.model, SEED))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    first, second = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    (beta1, beta2), eps = OPTIMIZER["betas"], OPTIMIZER["eps"]
    seen = []
    for step in range(1, STEPS + 1):
        samples, _ = data.read(np.arange((step - 1) * BATCH, step * BATCH))
        loss = mean_loss(model, samples)
        gradients = dict(
            zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
        )
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        shrink = min(1.0, OPTIMIZER["clip_grad_norm"] / norm)
        seen.append((float(loss.detach()), norm, rate(step)))
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * shrink
                first[name] = beta1 * first[name] + (1 - beta1) * gradient
                second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
                root = (second[name] / (1 - beta2**step)).sqrt() + eps
                if "_proj" in name or name.startswith("lm_head"):
                    weight -= rate(step) * OPTIMIZER["weight_decay"] * weight
                weight -= rate(step) * first[name] / (1 - beta1**step) / root
    return before, {name: weight.detach() for name, weight in weights.items()}, seen


def test_a_run_is_adamw_with_every_field_and_goes_on_in_the_middle(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Of every kind of parameter, where the run brings it from its initial value."""
    defaults = OptimizerConfig()
    assert OptimizerConfig.model_fields.keys() == OPTIMIZER.keys()
    assert not [name for name, value in OPTIMIZER.items() if getattr(defaults, name) == value]
    path = write_config(
        tmp_path, tiny_data,
        model={"ssd_skip": True, "ssd_conv_width": 3, "tie_word_embeddings": False,
               "init_std": 0.1},
        optimizer=OPTIMIZER,
        training={"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2,
                  "eval_every": 0, "seed": SEED},
        checkpoint={"every": 5},
    )  # fmt: skip
    (end,) = run_command("pretrain", path, before=partial(die_after_save, 5))
    assert end.code == -signal.SIGKILL, end.output
    succeed("pretrain", path)
    succeed("checkpoint", "export", tmp_path / "run", tmp_path / "model")
    found = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        found |= load_file(file)
    before, after, seen = train_by_hand(load_config(path))
    norms = [norm for _, norm, _ in seen]
    clip = OPTIMIZER["clip_grad_norm"]
    assert min(norms) < 0.9 * clip
    assert max(norms) > 1.1 * clip
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    for line, (loss, norm, lr) in zip(lines, seen, strict=True):
        assert line["lr"] == pytest.approx(lr, rel=1e-9)
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert found.keys() == after.keys()
    for name, weight in after.items():
        way = weight - before[name]
        assert (found[name] - weight).norm() < 1e-3 * way.norm(), name
