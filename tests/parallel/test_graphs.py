"""Captured micro-batches: what eager ones compute, bit for bit, from static memory alone."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity import MODEL, synthetic_batch
from benchmarks.ranks import run_ranks
from parallel.graphs import padded_boundaries, with_padded_boundaries
from parallel.replay import CaptureError, Replay
from tests.parallel.test_main_grads import Sums

STEPS, ROWS = 6, 2


def training(layout: dict[str, Any], dtype: str, model: dict[str, Any]) -> Any:
    """ZeroOptimizer, device and this rank's micro-batches of a step."""
    from megatron.core import parallel_state

    from parallel.build import DTYPES, build_stage
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.context import local_batch
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.zero import ZeroOptimizer

    device, parallel = prepare_host(), ParallelConfig(**layout)
    init_distributed(launch_from_environment(), device)
    init_groups(parallel)
    built = build_stage(
        ModelConfig(**model), parallel, seq_len=64, dtype=DTYPES[dtype], seed=5,
        deterministic=False, device=device,
    )  # fmt: skip
    zero = ZeroOptimizer(
        built, parallel, lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip_grad_norm=0.1
    )
    replica = parallel_state.get_data_parallel_rank()

    def batches(step: int, rows: int = ROWS) -> list[Any]:
        packed = step != STEPS - 1  # then rows that are single documents, another shape
        return [
            local_batch(synthetic_batch(step, range(at, at + rows), packed), device)
            for at in range(replica * 4 * rows, (replica + 1) * 4 * rows, rows)
        ]

    return zero, device, batches


def curve(
    layout: dict[str, Any], dtype: str, graphs: bool, model: dict[str, Any] = MODEL
) -> tuple[list[float], list[float], dict[str, Tensor], int, list[bool], list[Any]]:
    """Losses, norms, parameters, number of graphs, which steps' updates were made, and of bf16
    DeepSpeed's flags of every parameter before each update.

    The second step is refused, and the fourth has half the rows: another shape.
    """
    from parallel.graphs import MicroBatchGraphs, graph_maker
    from parallel.schedule import count_tokens, forward_backward

    zero, device, batches = training(layout, dtype, model)
    run = MicroBatchGraphs(zero, graph_maker(device)) if graphs else None
    losses, norms, applied, flags = [], [], [], []
    for step in range(STEPS):
        given = batches(step, ROWS // 2 if step == 3 else ROWS)
        tokens = count_tokens(given, device)
        sums = forward_backward(zero, given, tokens, 1, run.run if run else None)
        losses.append(float(sums.mean))
        flags += [Sums(zero).flags] if dtype == "bf16" else []
        update = zero.step(1e-2, refused=step == 1)
        norms.append(update.grad_norm)
        applied.append(update.applied)
    count = len(run._captured) if run else 0
    return losses, norms, zero.full_parameters(), count, applied, flags


@pytest.mark.parametrize(
    ("ranks", "layout", "dtype"),
    [
        (1, {}, "bf16"),
        (1, {"zero_stage": 0, "recompute": "full"}, "bf16"),
        (1, {"recompute": "selective"}, "fp32"),
        (2, {}, "fp32"),
        (2, {"zero_stage": 0}, "fp32"),
        (2, {"tensor": 2}, "bf16"),
        (2, {"tensor": 2, "sequence": False}, "fp32"),
    ],
    ids=str,
)
def test_replayed_micro_batches_train_as_eager_ones(
    ranks: int, layout: dict[str, Any], dtype: str
) -> None:
    eager = run_ranks(ranks, curve, layout, dtype, False)
    captured = run_ranks(ranks, curve, layout, dtype, True)
    for plain, replayed in zip(eager, captured, strict=True):
        assert replayed[0] == plain[0]
        assert replayed[1] == plain[1]
        assert replayed[4] == plain[4] == [True, False, True, True, True, True]
        assert replayed[5] == plain[5]
        for name, parameter in plain[2].items():
            assert torch.equal(replayed[2][name], parameter), name
        assert replayed[3] >= 2  # or nothing was replayed


# -- the recording ---------------------------------------------------------------------------------


def external_memory() -> tuple[set[str], int, set[str]]:
    """What a recorded micro-batch reads that was there before, and whether replays leave it."""
    from parallel.graphs import MicroBatchGraphs
    from parallel.schedule import count_tokens, forward_backward

    zero, device, batches = training({}, "bf16", MODEL | {"tie_word_embeddings": False})
    made: list[Replay] = []

    def make() -> Replay:
        made.append(Replay())
        return made[-1]

    graphs = MicroBatchGraphs(zero, make)
    known: dict[int, str] = {graphs._scale.data_ptr(): "scale"}
    for _, parameter in zero.built.named_parameters():
        known[parameter.untyped_storage().data_ptr()] = "weights"
        known[parameter.main_grad.untyped_storage().data_ptr()] = "sums of gradients"
    for table in zero.built.chunks[0]._tables.values():
        known |= {t.untyped_storage().data_ptr(): "rotations" for t in table}
    for step in range(2):
        given = batches(step)
        forward_backward(zero, given, count_tokens(given, device), 1, graphs.run)
        zero.step(1e-3)
    for captured in graphs._captured.values():
        known |= {t.untyped_storage().data_ptr(): "inputs" for t in vars(captured.inputs).values()}
    found = {known.get(address, "unknown") for graph in made for address in graph.external}
    now = {
        t.untyped_storage().data_ptr() == address
        for graph in made
        for address, t in graph.external.items()
    }
    return found, len(made), {str(same) for same in now}


def test_a_recorded_micro_batch_reads_static_memory_alone() -> None:
    ((found, graphs, same),) = run_ranks(1, external_memory)
    assert found == {"inputs", "weights", "sums of gradients", "rotations", "scale"}
    assert graphs == 1
    assert same == {"True"}


def test_a_replay_computes_from_what_memory_holds_now() -> None:
    a, b, total = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.zeros(2)

    def call() -> Tensor:
        product = (a * b).view(2, 1)[:, 0] + 1
        total.add_(product)
        return product

    graph = Replay()
    result = graph.record(call)
    assert total.tolist() == [0, 0]  # undone
    for _ in range(2):
        graph.replay()
    a.copy_(torch.tensor([10.0, 0.0]))
    graph.replay()
    assert result.tolist() == [31, 1]
    assert total.tolist() == [2 * 4 + 31, 2 * 9 + 1]


@pytest.mark.parametrize(
    "call", [lambda t: t.sum().item(), lambda t: t.nonzero(), lambda t: bool((t > 0).any())]
)
def test_reading_a_value_ends_a_recording(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(CaptureError, match="reads a value"):
        Replay().record(lambda: call(torch.ones(2)))


def test_a_host_decision_is_frozen_by_a_recording() -> None:
    """So that the comparisons above can fail: tolist() is not seen below autograd."""
    borders, values = torch.tensor([1, 3]), torch.arange(4.0)
    graph = Replay()
    result = graph.record(lambda: torch.stack([p.sum() for p in values.split(borders.tolist())]))
    borders.copy_(torch.tensor([3, 1]))
    graph.replay()
    assert result.tolist() == [0, 6]  # of the borders of then


# -- failures --------------------------------------------------------------------------------------


def with_a_reading_layer(is_strict: bool) -> tuple[list[float], list[str], str]:
    """Losses, warnings, and the error, of a model that reads a value in its second layer."""
    import os

    from parallel.graphs import MicroBatchGraphs, graph_maker
    from parallel.schedule import count_tokens, forward_backward

    os.environ["TRANSXSSM_STRICT"] = str(int(is_strict))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transxssm").addHandler(handler)
    zero, device, batches = training({}, "bf16", MODEL)
    feed_forward = zero.built.chunks[0].model.layers["1"].feed_forward
    forward = feed_forward.forward

    def reads(h: Tensor) -> Tensor:
        assert h.abs().max().item() > 0
        return forward(h)

    feed_forward.forward = reads
    graphs, losses = MicroBatchGraphs(zero, graph_maker(device)), []
    for step in range(3):
        given = batches(step)
        try:
            sums = forward_backward(zero, given, count_tokens(given, device), 1, graphs.run)
        except CaptureError as error:
            return losses, messages, str(error)
        losses.append(float(sums.mean))
        zero.step(1e-2)
    return losses, messages, ""


def test_a_capture_that_fails_goes_on_eagerly_and_says_so_once() -> None:
    ((losses, messages, error),) = run_ranks(1, with_a_reading_layer, False)
    eager, *_ = run_ranks(1, curve, {}, "bf16", False)[0]
    assert losses[:2] == eager[:2]
    assert len(losses) == 3
    assert not error
    said = [message for message in messages if "cannot be captured" in message]
    assert len(said) == 1
    assert "_local_scalar_dense" in said[0]


def test_a_capture_that_fails_is_an_error_in_strict_mode() -> None:
    ((losses, _, error),) = run_ranks(1, with_a_reading_layer, True)
    assert "_local_scalar_dense reads a value" in error
    assert losses == []


# -- borders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("borders", "rows", "padded"),
    [
        ([0, 8], 1, [0, 8]),
        ([0, 4, 8], 2, [0, 4, 8]),
        ([0, 4, 8, 12], 3, [0, 4, 8, 12]),  # rows are documents
        ([0, 1, 4, 8, 12], 3, [0, 1, 4, 8, 12]),
        ([0, 1, 2, 8], 1, [0, 1, 2, 8, 8]),
        ([0, 1, 2, 3, 4, 8], 1, [0, 1, 2, 3, 4, 8, 8, 8, 8]),
    ],
)
def test_segments_are_a_power_of_two(borders: list[int], rows: int, padded: list[int]) -> None:
    given = torch.tensor(borders, dtype=torch.int32)
    found = padded_boundaries(given, rows, borders[-1])
    assert found.tolist() == padded
    assert found.dtype == torch.int32


def losses_and_gradients(dtype: str) -> list[list[tuple[Tensor, dict[str, Tensor]]]]:
    """Of several micro-batches: as they are, with padded borders, and with empty segments."""
    from dataclasses import replace

    from parallel.schedule import count_tokens, forward_backward

    zero, device, batches = training({}, dtype, MODEL)
    found = []
    for batch in (batches(0)[0], batches(1)[1], batches(2, 1)[0], batches(STEPS - 1)[0]):
        longer = torch.full((3,), batch.tokens.numel(), dtype=torch.int32)
        within = torch.cat((batch.cu_seqlens, batch.cu_seqlens[1:-1], longer)).sort().values
        seen = []
        for given in (
            batch,
            with_padded_boundaries(batch),
            replace(batch, cu_seqlens=within, local_cu_seqlens=within),
        ):
            sums = forward_backward(zero, [given], count_tokens([given], device))
            seen.append((sums.loss, zero.full_gradients()))
            zero.step(0.0, refused=True)
        found.append(seen)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_empty_segments_change_no_bit(dtype: str) -> None:
    for plain, *others in run_ranks(1, losses_and_gradients, dtype)[0]:
        for loss, gradients in others:
            assert torch.equal(loss, plain[0])
            for name, gradient in plain[1].items():
                assert torch.equal(gradients[name], gradient), name
