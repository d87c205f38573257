"""Bytes a rank sends in one step, by axis.

Of g ranks that each hold a part of size n of the whole, an all-gather or reduce-scatter sends
(g - 1) n from each, an all-reduce of n 2 (g - 1) / g · n, an all-to-all of n (g - 1) / g · n.
"""

from parallel.config import ModelConfig, ParallelConfig
from parallel.footprint import Workload, exchanges_heads
from parallel.memory import stage_parameters
from parallel.topology import Axis


def traffic(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, stage: int, chunks: list[range]
) -> dict[Axis, float]:
    """Of a rank of a stage that holds every pipeline-th of `chunks`, all its micro-batches."""
    held = list(range(stage, parallel.num_chunks, parallel.pipeline))
    layers = [
        (layer, parallel.recompute_of(n)) for index in held for n, layer in enumerate(chunks[index])
    ]
    last = parallel.num_chunks - 1
    tensor = sum(_tensor_layer(model, parallel, work, again) for _, again in layers)
    tensor += 2 * _tensor_border(model, parallel, work) * ((0 in held) + (last in held))
    context = sum(_context_layer(model, parallel, work, *layer) for layer in layers)
    hidden = work.tokens(parallel) * model.hidden_size * work.itemsize
    sent = hidden // parallel.tensor if parallel.sequence_parallel else hidden
    ends = sum((index > 0) + (index < last) for index in held)  # back, and on
    norms = 4 * len(layers) + (last in held) if parallel.sequence_parallel else 0
    sums = _all_reduce(norms * model.hidden_size * work.itemsize, parallel.tensor)
    return {
        "tensor": work.micro_batches * (tensor + sums),
        "context": work.micro_batches * context,
        "data": _data(parallel, work, stage_parameters(model, parallel, stage, chunks)),
        "pipeline": float(work.micro_batches * ends * sent),
    }


def _all_reduce(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size


def _tensor_layer(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, recompute: str
) -> float:
    """One layer, forward and backward: each of its halves gathers tokens and scatters sums of them
    (or, with tokens whole everywhere, sums them), in backward the other way round."""
    hidden = work.tokens(parallel) * model.hidden_size * work.itemsize
    passes = 2.0 + (recompute == "full")  # which makes one more forward
    if parallel.sequence_parallel:
        passes += 0.5  # backward gathers the inputs once more
    return passes * 2 * _all_reduce(hidden, parallel.tensor)


def _tensor_border(model: ModelConfig, parallel: ParallelConfig, work: Workload) -> float:
    """One pass of embedding or head."""
    hidden = work.tokens(parallel) * model.hidden_size * work.itemsize
    return _all_reduce(hidden, parallel.tensor) / 2


def _context_layer(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, layer: int, recompute: str
) -> float:
    """One layer of one micro-batch, forward and backward."""
    context, tensor = parallel.context, parallel.tensor
    if context == 1:
        return 0
    passes = 2 if recompute == "none" else 3
    heads, kv_heads = model.num_heads // tensor, model.num_kv_heads // tensor
    if not model.is_attention(layer):  # float32 states of a row, and their decays
        state = heads * (model.head_dim * model.state_dim + 1) * work.micro_batch_size
        return passes * (context - 1) * 4 * state
    head = work.tokens(parallel) * model.head_dim * work.itemsize
    if exchanges_heads(model, parallel):
        return passes * (context - 1) / context * (2 * heads + 2 * max(kv_heads, context)) * head
    forward = (context - 1) * 2 * kv_heads * head
    # backward: keys and values once more, their gradients all the way round, in float32
    gradients = context * 2 * kv_heads * head * 4 / work.itemsize
    return (passes - 1) * forward + forward + gradients


def _data(parallel: ParallelConfig, work: Workload, numel: int) -> float:
    """Gradients in float32, once a step or (ZeRO 2, 3) every micro-batch; updated parameters; under
    ZeRO 3 parameters before every forward and backward instead, where they are not kept.

    Gradients are scattered to the ranks that own them at ZeRO 1 in bf16 and at ZeRO 3; DeepSpeed's
    ZeRO 1 in float32 and its ZeRO 2 sum every bucket on all ranks and keep their own part of it.
    """
    replicas = work.data * parallel.context
    share = (replicas - 1) / replicas
    parameters, gradients = share * work.itemsize * numel, share * 4 * numel
    if parallel.zero_stage == 0:
        return 2 * gradients
    if not parallel.reduces_in_backward:
        return (1 if work.itemsize == 2 else 2) * gradients + parameters
    if parallel.zero_stage < 3:
        return 2 * work.micro_batches * gradients + parameters
    return work.micro_batches * (gradients + 2 * parameters)
