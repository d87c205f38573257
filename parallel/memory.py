"""Bytes a rank needs, by category, for any layout: counted from what each operation keeps.

A stage keeps as many micro-batches as its schedule has in flight, of each what `parallel.footprint`
counts; recomputed layers keep their output alone.

Not counted: what operations allocate and free inside themselves, the CUDA context, NCCL's buffers,
and what the allocator loses to fragments.
"""

from dataclasses import dataclass, fields

from kernels.cross_entropy.sizes import rows_at_once
from parallel.config import ModelConfig, ParallelConfig
from parallel.footprint import (
    Workload,
    chunks_in_flight,
    embedding_parameters,
    layer_activations,
    layer_parameters,
    stream_tokens,
)
from parallel.sizes import BUCKET_ELEMENTS, GATHERED_ELEMENTS, head_block_tokens


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    master: int
    moments: int
    activations: int
    logits: int
    """Of the output head, besides what it keeps: a block's logits and its gradients."""
    working: int
    """A layer's backward: what is computed again, and gradients of activations."""
    communication: int
    """Buckets in which gradients are reduced."""
    gathered: int
    """Whole parameters under ZeRO 3."""
    host: int
    """In the host's memory: master weights, moments and gradients of an offloaded optimizer."""
    reduces_in_backward: bool
    """Whether the buckets are there during backward, or after it."""

    @property
    def peak(self) -> int:
        """Of the device: what is always there, and the worst moment of backward or reduction."""
        always = self.weights + self.gathered + self.gradients + self.master + self.moments
        backward = self.activations + max(self.logits, self.working)
        if self.reduces_in_backward:
            return always + backward + self.communication
        return always + max(backward, self.communication)

    def by_category(self) -> dict[str, int]:
        """Bytes by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type is int}


def memory_by_stage(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, chunks: list[range]
) -> list[RankMemory]:
    """Of a rank of each pipeline stage; chunks: every chunk's layers (parallel.split)."""
    return [
        _rank_memory(model, parallel, work, stage, chunks) for stage in range(parallel.pipeline)
    ]


def _rank_memory(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, stage: int, chunks: list[range]
) -> RankMemory:
    numel = stage_parameters(model, parallel, stage, chunks)
    shards = work.shards(parallel)
    in_backward = parallel.reduces_in_backward
    on_device = parallel.offload == "none"
    gradients = 4 * numel // (shards if parallel.zero_stage > 1 else 1)
    bucket = min(numel, BUCKET_ELEMENTS)
    communicated = work.itemsize if in_backward and parallel.zero_stage < 3 else 4
    if in_backward and work.on_gpu:
        communicated *= 2  # one is filled while the other is reduced
    elif not in_backward and work.itemsize == 4:
        gradients += 4 * numel // shards  # averaged ones, beside those that autograd made
        communicated *= 1 if shards == 1 else 2  # and put together once more
    return RankMemory(
        weights=work.itemsize * numel // (shards if parallel.zero_stage == 3 else 1),
        gradients=gradients * on_device,
        master=4 * numel // shards * on_device,
        moments=8 * numel // shards * on_device,
        activations=stage_activations(model, parallel, work, stage, chunks),
        logits=head_bytes(model, parallel, work) if stage == parallel.pipeline - 1 else 0,
        working=working_bytes(model, parallel, work),
        communication=bucket * communicated,
        gathered=work.itemsize * min(numel, GATHERED_ELEMENTS) if parallel.zero_stage == 3 else 0,
        host=0 if on_device else (4 + 8) * numel // shards + gradients,
        reduces_in_backward=in_backward,
    )


def stage_parameters(
    model: ModelConfig, parallel: ParallelConfig, stage: int, chunks: list[range]
) -> int:
    """Elements on one rank of a stage."""
    return sum(
        chunk_parameters(model, parallel, chunks[index], index)
        for index in range(stage, parallel.num_chunks, parallel.pipeline)
    )


def chunk_parameters(
    model: ModelConfig, parallel: ParallelConfig, layers: range, index: int
) -> int:
    """Elements of a chunk: its layers, the embedding on the first, norm and head on the last."""
    numel = sum(layer_parameters(model, parallel, layer) for layer in layers)
    first, last = index == 0, index == parallel.num_chunks - 1
    table = embedding_parameters(model, parallel)
    tables = first + last if not model.tie_word_embeddings or parallel.pipeline > 1 else first
    return numel + table * tables + model.hidden_size * last


def stage_activations(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, stage: int, chunks: list[range]
) -> int:
    """All micro-batches in flight on a stage, when most are."""
    each = [
        chunk_activations(model, parallel, work, chunks[index], index)
        for index in range(stage, parallel.num_chunks, parallel.pipeline)
    ]
    # interleaved stages take micro-batches by as many as there are stages
    in_flight = chunks_in_flight(parallel, work.micro_batches, stage)
    return sum(each[i // parallel.pipeline % parallel.virtual_pipeline] for i in range(in_flight))


def chunk_activations(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, layers: range, index: int
) -> int:
    """What one micro-batch leaves for backward in a chunk."""
    tokens = work.tokens(parallel)
    stream = stream_tokens(parallel, tokens) * model.hidden_size * work.itemsize
    total = stream  # the input of the first layer
    for n, layer in enumerate(layers):
        again = parallel.recompute_of(n)
        if again == "full":
            total += stream
        else:
            total += layer_activations(model, parallel, work, layer, again == "selective")
    first, last = index == 0, index == parallel.num_chunks - 1
    if not last and parallel.virtual_pipeline == 1:
        total -= stream  # the output is freed once it is sent
    if first and parallel.tensor > 1:
        total += 9 * tokens  # ids within the rank's rows, and which are
    if last:
        total += head_gradients(model, parallel, work)
    rotations = {model.head_dim} if model.rope != "none" else set()
    rotations |= {model.state_dim} if model.rope == "unified" else set()
    if work.on_gpu and not all(model.is_attention(layer) for layer in layers):
        # the document of every token, and the scan's own table of rotations
        total += tokens * (4 + (work.itemsize * model.state_dim if model.rope == "unified" else 0))
    return total + 4 * tokens * sum(rotations)  # cos and sin, float32


def head_bytes(model: ModelConfig, parallel: ParallelConfig, work: Workload) -> int:
    """Besides what the head keeps, the most of three moments: a block's loss, whose gradient takes
    the logits' place; its share of the rows' gradient, which is summed in float32, and which a GPU
    adds as it computes it; the sum beside its rounded copy, where it is rounded."""
    vocab, hidden = model.padded_vocab_size // parallel.tensor, model.hidden_size
    tokens, item = work.tokens(parallel), work.itemsize
    block = min(tokens, head_block_tokens(vocab, work.on_gpu))
    logits, rounded, total = item * block * vocab, item * vocab * hidden, 4 * vocab * hidden
    kept = head_sum_itemsize(parallel, work) * vocab * hidden
    exponentials = 0 if work.on_gpu else 4 * min(block, rows_at_once(vocab, on_cpu=True)) * vocab
    loss = logits + exponentials + (total if block < tokens else 0)
    product = logits + total + (0 if work.on_gpu or item == 4 else rounded)
    rounding = total + (kept if kept < total else 0)
    return max(loss, product, rounding) - kept


def head_gradients(model: ModelConfig, parallel: ParallelConfig, work: Workload) -> int:
    """What the head's forward leaves for backward: gradients of hidden states and of its rows."""
    tokens = work.tokens(parallel) * work.itemsize
    vocab = model.padded_vocab_size // parallel.tensor * head_sum_itemsize(parallel, work)
    return (tokens + vocab) * model.hidden_size


def head_sum_itemsize(parallel: ParallelConfig, work: Workload) -> int:
    """Bytes of a number of the rows' gradient: not rounded where it is added to a float32 one."""
    return work.itemsize if parallel.reduces_in_backward else 4


def working_bytes(model: ModelConfig, parallel: ParallelConfig, work: Workload) -> int:
    """The largest of a layer's activations that backward computes again, and gradients of the
    feed-forward's three inner tensors or of the mixer's inputs and outputs."""
    tokens, item = work.tokens(parallel), work.itemsize
    again = 0
    for layer in range(min(model.num_layers, model.attn_layer_period)):
        whole = layer_activations(model, parallel, work, layer, False)
        if parallel.recompute == "full":
            again = max(again, whole)
        elif parallel.recompute == "selective":
            again = max(again, whole - layer_activations(model, parallel, work, layer, True))
    inner = 3 * model.intermediate_size
    mixer = 3 * model.num_heads * model.head_dim + 2 * model.ssd_groups * model.state_dim
    gradients = max(inner, mixer) // parallel.tensor + 2 * model.hidden_size
    return again + tokens * item * gradients
