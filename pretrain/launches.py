"""What one training step asks of a GPU, counted without one: operations, bytes and waits.

The stage, schedule and optimizer that train are built on the meta device, under a fake process
group, and make steps there: shapes and operations are those of the real code, nothing is computed.
Triton's kernels are listed by their names (`kernels.audit.recording`), all else by dispatch
(`parallel.ledger`).
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from kernels import attention
from kernels.audit.compiling import TARGETS
from kernels.audit.recording import record_only
from parallel.compat import gpu_stand_in, prepare_host
from parallel.context import LocalBatch
from parallel.graphs import WARM_UP, MicroBatchGraphs, why_eager
from parallel.groups import destroy_groups, init_groups
from parallel.ledger import HEAD, HOOKS, Direction, Ledger, Place, Tally, watch
from parallel.schedule import count_tokens, forward_backward, mean_loss
from parallel.sizes import head_block_tokens
from parallel.zero import ZeroOptimizer
from pretrain.config import Config, ConfigError
from pretrain.estimate import workload
from pretrain.stage import configured_optimizer

META = torch.device("meta")
DOCUMENTS = 2  # of each row: packed, as training data is
# What a step has once, in this order
ONCE = ("tokens", "schedule", "gradient reduction", "loss", "update")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"}


@dataclass(frozen=True)
class Counts:
    """One step of one rank of a model replica."""

    micro_batch: dict[Place, Tally]  # of one more micro-batch
    once: dict[str, Tally]  # of what a step has beside, by part
    step: Tally
    micro_batches: int
    tokens: int  # of a micro-batch, on this rank
    layers: dict[str, int]  # of each kind, that this rank has
    head_blocks: int  # of a micro-batch; 0 where this rank has no head
    logits: int  # of a micro-batch
    ranks: int  # of a replica

    def of(
        self, layer: str | None = None, part: str | None = None, direction: Direction | None = None
    ) -> Tally:
        """Sum over a micro-batch's places with these fields."""
        return Tally.sum(
            tally
            for place, tally in self.micro_batch.items()
            if (layer is None or place.layer == layer)
            and (part is None or place.part == part)
            and (direction is None or place.direction == direction)
        )

    def a_layer(self, layer: str, part: str | None = None) -> float:
        """Operations of a layer of this kind, forward and backward."""
        return self.of(layer, part).operations / max(1, self.layers[layer])

    def summary(self) -> dict[str, float]:
        """The numbers to hold a change to."""
        head, hooks, whole = self.of("", HEAD), self.of("", HOOKS), self.of()
        beside = sum(moved for kind, moved in head.kind_bytes.items() if kind not in PRODUCTS)
        update = self.once["update"]
        found = {f"{k}_layer_operations": self.a_layer(k) for k, n in self.layers.items() if n}
        if self.head_blocks:
            found["head_operations_a_block"] = head.operations / self.head_blocks
            found["head_bytes_a_logit_beside_products"] = beside / self.logits
        return found | {
            "gradient_hooks_operations": hooks.operations,
            "micro_batch_operations": whole.operations,
            "micro_batch_bytes": whole.bytes,
            "micro_batch_waits": whole.waits,
            "update_operations": update.operations,
            "update_waits": update.waits,
            "step_operations": self.step.operations,
            "step_bytes": self.step.bytes,
            "step_waits": self.step.waits,
        }


def count(config: Config, rank: int = 0, *, graphs: bool = False) -> Counts:
    """Count one step of a rank of one model replica, with the layout that is configured.

    graphs: count what the host launches where micro-batches are graphs. Joins a fake job, and
    leaves it. Raises ConfigError for what cannot be counted.
    """
    parallel = config.parallel
    if parallel.offload != "none":
        raise ConfigError(
            f"parallel.offload = {parallel.offload!r}: the optimizer's state would be built in this"
            " host's memory; count with --parallel.offload none"
        )
    if parallel.zero_stage == 3:
        raise ConfigError(
            "parallel.zero_stage = 3: DeepSpeed moves the weights through this host's memory when"
            " it partitions them; count with --parallel.zero_stage 2"
        )
    if graphs and (reason := why_eager(parallel)):
        raise ConfigError(f"--graphs: micro-batches run eagerly with {reason}")
    ranks = parallel.tensor * parallel.context * parallel.pipeline
    config.data_parallel(ranks)
    work = workload(config, 1)
    with _fake_job(rank, ranks), gpu_stand_in(META), _attention_of_cuda():
        init_groups(parallel)
        with META:
            zero = configured_optimizer(config, META)
        ledger = Ledger(META, _answer(work.seq_len // DOCUMENTS))
        watch(ledger, zero)
        few = parallel.pipeline  # as interleaved schedules want
        counted = []
        with record_only(TARGETS["sm_90"], ledger.launched):
            run = None
            if graphs:
                run = MicroBatchGraphs(zero, partial(_CountedGraph, ledger)).run
                run([_batch(config) for _ in range(WARM_UP + 1)], torch.empty((), device=META))
            for micro_batches in (few, 2 * few):
                batches = [_batch(config) for _ in range(micro_batches)]
                ledger.tallies = {}
                with ledger:
                    step(zero, batches, config.optimizer.lr, ledger, run)
                counted.append(ledger.tallies)
        chunks = zero.built.chunks
        kinds = [layer.attn is None for c in chunks for layer in c.model.layers.values()]
        tokens = work.micro_batch_size * work.seq_len // parallel.context
        rows = config.model.padded_vocab_size // parallel.tensor
        has_head = any(chunk.last for chunk in chunks)
        blocks = -(-tokens // head_block_tokens(rows, True)) if has_head else 0
    first, second = counted
    # the first micro-batch may differ: where it leaves gradients, the others add to them
    more = {place: _share(tally, first.get(place), few) for place, tally in second.items()}
    once = {part: Tally() for part in ONCE}
    for place, tally in second.items():
        if place.part in ONCE and not place.layer:
            once[place.part].add(tally)
            once[place.part].add(more[place], -2 * few)
    step_total = Tally.sum(second.values())
    step_total.add(Tally.sum(more.values()), work.micro_batches - 2 * few)
    return Counts(
        {place: tally for place, tally in more.items() if tally.operations},
        once,
        step_total,
        work.micro_batches,
        tokens,
        {"ssd": sum(kinds), "attention": len(kinds) - sum(kinds)},
        blocks,
        tokens * rows if has_head else 0,
        ranks,
    )


def _share(more: Tally, fewer: Tally | None, by: int) -> Tally:
    """One of the `by` micro-batches that `more` has beside those of `fewer`."""
    found = Tally.sum([more])
    if fewer is not None:
        found.add(fewer, -1)
    return Tally(
        found.operations // by,
        found.bytes // by,
        found.waits // by,
        Counter({kind: n // by for kind, n in found.kinds.items()}),
        Counter({kind: n // by for kind, n in found.kind_bytes.items()}),
    )


class _CountedGraph:
    """A launch of a graph is one operation; what is in it was counted without graphs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def replay(self) -> None:
        self._ledger.count("graph", 0)


def step(
    zero: ZeroOptimizer,
    batches: Sequence[LocalBatch],
    lr: float,
    ledger: Ledger,
    run: Callable[[Sequence[LocalBatch], Tensor], list[Tensor]] | None = None,
) -> float | None:
    """One step as `pretrain.trainer` makes it; returns the mean loss."""
    device = batches[0].tokens.device
    with ledger.part("tokens"):
        tokens = count_tokens(batches, device)
    with ledger.part("schedule"):
        sums = forward_backward(zero, batches, tokens, 1, run)
    norm = zero.grad_norm()
    with ledger.part("loss"):
        losses, counts, grad_norm = sums.on_host(norm)
    zero.step(lr, grad_norm)
    return mean_loss(losses, counts)


def _batch(config: Config) -> LocalBatch:
    """A micro-batch of rows of DOCUMENTS documents of one length, without contents."""
    work = workload(config, 1)
    rows, part = work.micro_batch_size, work.seq_len // config.parallel.context
    shape = (rows, part)
    boundaries = torch.empty(rows * DOCUMENTS + 1, dtype=torch.int32, device=META)
    return LocalBatch(
        torch.empty(shape, dtype=torch.int64, device=META),
        torch.empty(shape, dtype=torch.int64, device=META),
        torch.empty(shape, device=META),
        torch.empty(shape, dtype=torch.int32, device=META),
        boundaries,
        boundaries,
        torch.empty(rows, dtype=torch.int64, device=META),
    )


def _answer(document: int) -> Callable[[Tensor, str], Any]:
    """What the host reads: all is finite, a length is a document's, and gradients are clipped."""

    def read(tensor: Tensor, made_by: str) -> Any:
        if tensor.dtype == torch.bool:
            return made_by in ("lt", "gt")
        return 1e6 if tensor.is_floating_point() else document

    return read


@contextmanager
def _fake_job(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which nothing is sent."""
    prepare_host()
    if "meta" not in dist.Backend.backend_capability["fake"]:
        dist.Backend.backend_capability["fake"].append("meta")
    names = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names  # DeepSpeed reads them
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        destroy_groups()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _attention_of_cuda() -> Iterator[None]:
    """In float32 SDPA chooses its memory-efficient kernel on CUDA, and on the meta device none."""
    stock = attention.scaled_dot_product_attention

    def efficient(
        q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        if enable_gqa:  # which that kernel has not
            return stock(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)
        out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, is_causal, scale=scale
        )[0]
        return out

    attention.scaled_dot_product_attention = efficient  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.scaled_dot_product_attention = stock
