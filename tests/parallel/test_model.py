"""The stage against independent implementations, and documents that must not see each other."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ranks import run_ranks
from checkpoints_tools.export import single_gpu_config
from parallel.config import ModelConfig
from tests.oracle import model_logits
from tests.tiny import MODEL

VARIANTS: list[dict[str, Any]] = [
    {},
    {"rope": "attention_only"},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"ssd_skip": True, "ssd_conv_width": 4},
    {"tie_word_embeddings": False, "chunk_size": 16},
]


def build(
    fields: dict[str, Any], parallel: dict[str, Any] | None = None
) -> tuple[Any, ModelConfig]:
    """This rank's stage with float32 weights."""
    from parallel.build import build_stage
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment

    layout, model = ParallelConfig(**(parallel or {})), ModelConfig(**(MODEL | fields))
    device = prepare_host()
    init_distributed(launch_from_environment(), device)
    init_groups(layout)
    built = build_stage(
        model, layout, seq_len=64, dtype=torch.float32, seed=3, deterministic=False, device=device
    )
    return built.chunks[0], model


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """position_ids [1, L] and cu_seqlens of one row of documents."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return positions, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def stage_and_oracle_logits(fields: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    stage, model = build(fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stage.parameters():  # norms and residual weights are 1 at initialisation
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    lengths = [23, 1, 40]
    positions, cu_seqlens = packed(lengths)
    ids = torch.randint(0, 300, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = stage.logits(ids, positions, cu_seqlens)[:, :300]
    tensors = {n: p.detach()[:300].numpy() if "embed" in n or "lm_head" in n else
               p.detach().numpy() for n, p in stage.named_parameters()}  # fmt: skip
    state = {"config": {"model": model.model_dump()}, "eod_id": 0, "pad_id": 1}
    config = vars(single_gpu_config(state, "fp32"))
    return logits.numpy(), model_logits(tensors, config, ids[0].numpy(), lengths)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_logits_match_float64_oracle(fields: dict[str, Any]) -> None:
    found, expected = run_ranks(1, stage_and_oracle_logits, fields)[0]
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def live_projections(fields: dict[str, Any]) -> list[bool]:
    """Whether what each SSD layer projects into is alive after a forward pass."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from parallel import mixers

    buffers, project = [], mixers.project

    def remembered(h: Any, linears: Any, config: Any) -> tuple[torch.Tensor, ...]:
        parts = project(h, linears, config)
        if len(parts) == 4:
            buffers.append(StorageWeakRef(parts[0].untyped_storage()))
        return parts

    mixers.project = remembered  # type: ignore[assignment]
    stage, _ = build(fields)
    positions, cu_seqlens = packed([64])
    hidden = stage.hidden(torch.zeros(1, 64, dtype=torch.int64), positions, cu_seqlens)
    assert hidden.requires_grad
    return [not buffer.expired() for buffer in buffers]


def test_a_convolution_does_not_keep_what_it_has_read() -> None:
    """Its inputs are copied side by side; the step sizes, of the same buffer, must not keep it."""
    assert set(run_ranks(1, live_projections, {})[0]) == {True}
    assert set(run_ranks(1, live_projections, {"ssd_conv_width": 4})[0]) == {False}


def document_logits(parallel: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Logits of the second document: packed, packed behind a changed first, and alone."""
    stage, _ = build({}, parallel)
    positions, cu_seqlens = packed([30, 34])
    ids = torch.randint(0, 300, (1, 64), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 29] = (ids[0, 29] + 1) % 300
    alone_positions, alone_cu_seqlens = packed([34])
    with torch.no_grad():
        return (
            stage.logits(ids, positions, cu_seqlens)[30:],
            stage.logits(changed, positions, cu_seqlens)[30:],
            stage.logits(ids[:, 30:], alone_positions, alone_cu_seqlens),
        )


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence": False}], ids=str)
def test_second_document_ignores_first(parallel: dict[str, Any]) -> None:
    for base, changed, alone in run_ranks(parallel.get("tensor", 1), document_logits, parallel):
        assert torch.equal(base, changed)
        seen = torch.isfinite(base)  # vocabulary padding is -inf
        assert (base - alone)[seen].norm() < 1e-5 * alone[seen].norm()


def mixers_run(parallel: dict[str, Any]) -> tuple[int, int]:
    """Scans and attentions of a forward and a backward."""
    from parallel import mixers

    calls = [0, 0]

    def counted(at: int, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[at] += 1
            return function(*arguments, **named)

        return call

    mixers.ssd_from_log = counted(0, mixers.ssd_from_log)
    mixers.attention = counted(1, mixers.attention)
    stage, _ = build({}, parallel)
    ids = torch.randint(0, 300, (1, 64), generator=torch.Generator().manual_seed(0))
    stage.hidden(ids, *packed([23, 41])).sum().backward()
    return calls[0], calls[1]


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("selective", 2), ("full", 2)])
def test_mixers_run_again_where_they_are_recomputed(recompute: str, times: int) -> None:
    assert run_ranks(1, mixers_run, {"recompute": recompute}) == [(2 * times, 2 * times)]
