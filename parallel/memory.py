"""Bytes a rank needs, by category, for any layout: counted from what each operation keeps.

Numbers that a layer keeps for backward, per token; H, I: the hidden and feed-forward widths,
W = heads · head_dim, t: the tensor-parallel size (H* is H / t under sequence parallelism):

    residual stream           2 H*: the layer's output and the stream between its halves
    inputs of projections     2 H:  one of each half
    SSD                       (2 W + 2 groups · state_dim + heads) / t: x, b, c, Δ and y; and
                              heads / t · head_dim · state_dim for every chunk of a row
    attention                 (2 W + 2 kv_heads · head_dim) / t: q, k, v and its output; and
                              4 heads / t bytes of softmax statistics
    feed-forward              3 I / t: gate, up and their product; on the CPU also silu(gate)

Recomputed layers keep their output alone; selectively recomputed ones what projections give and
take. A stage keeps as many micro-batches as its schedule has in flight.

Not counted: what operations allocate and free inside themselves, the CUDA context, NCCL's buffers,
and what the allocator loses to fragments.
"""

from dataclasses import dataclass, fields

from parallel.config import ModelConfig, ParallelConfig
from parallel.sizes import BUCKET_ELEMENTS, GATHERED_ELEMENTS, head_block_tokens
from parallel.split import layer_chunks

CPU_CHUNK = 64  # of the CPU's scan, which keeps a state at each border (kernels/ssd/chunked.py)
GPU_CHUNK = {
    2: 64,
    4: 16,
}  # of the kernels, by bytes of a number, on an H100 (kernels/ssd/tiles.py)


@dataclass(frozen=True)
class Workload:
    """What one step of a rank does. `micro_batches`: of one data-parallel rank, per step."""

    data: int
    seq_len: int
    micro_batch_size: int
    micro_batches: int
    itemsize: int  # bytes of a parameter or activation: 2 in bf16
    on_gpu: bool = True

    def tokens(self, parallel: ParallelConfig) -> int:
        """Of one micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.seq_len // parallel.context


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
    model: ModelConfig, parallel: ParallelConfig, work: Workload
) -> list[RankMemory]:
    """Of a rank of each pipeline stage."""
    chunks = layer_chunks(model, parallel, work.seq_len)
    return [
        _rank_memory(model, parallel, work, stage, chunks) for stage in range(parallel.pipeline)
    ]


def _rank_memory(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, stage: int, chunks: list[range]
) -> RankMemory:
    numel = stage_parameters(model, parallel, stage, chunks)
    shards = work.data * parallel.context if parallel.zero_stage else 1
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


# -- parameters -----------------------------------------------------------------------------------


def layer_parameters(model: ModelConfig, parallel: ParallelConfig, layer: int) -> int:
    """Elements of one layer on one tensor-parallel rank: matrices split, norms whole."""
    hidden, width = model.hidden_size, model.num_heads * model.head_dim
    if model.is_attention(layer):
        mixer = 2 * hidden * width + 2 * hidden * model.num_kv_heads * model.head_dim
    else:
        bc = 2 * model.ssd_groups * model.state_dim
        mixer = hidden * (2 * width + bc + model.num_heads)
        mixer += model.num_heads * (2 + model.ssd_skip) + model.ssd_conv_width * (width + bc)
    return (mixer + 3 * hidden * model.intermediate_size) // parallel.tensor + 4 * hidden


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
    table = model.padded_vocab_size // parallel.tensor * model.hidden_size
    tables = first + last if not model.tie_word_embeddings or parallel.pipeline > 1 else first
    return numel + table * tables + model.hidden_size * last


# -- activations ----------------------------------------------------------------------------------


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


def chunks_in_flight(parallel: ParallelConfig, micro_batches: int, stage: int) -> int:
    """Forward passes of chunks that a stage has made before its first backward (1F1B; Narayanan et
    al. 2021, arXiv 2104.04473, section 2.2)."""
    after, chunks = parallel.pipeline - stage - 1, parallel.virtual_pipeline
    warmup = after if chunks == 1 else 2 * after + (chunks - 1) * parallel.pipeline
    return min(warmup + 1, micro_batches * chunks)


def chunk_activations(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, layers: range, index: int
) -> int:
    """What one micro-batch leaves for backward in a chunk."""
    tokens, full = work.tokens(parallel), parallel.recompute == "full"
    stream = _stream_tokens(parallel, tokens) * model.hidden_size * work.itemsize
    total = stream  # the input of the first layer
    for n, layer in enumerate(layers):
        again = n < (parallel.recompute_layers or model.num_layers)
        if full and again:
            total += stream
        else:
            selective = parallel.recompute == "selective" and again
            total += layer_activations(model, parallel, work, layer, selective)
    first, last = index == 0, index == parallel.num_chunks - 1
    if not last and parallel.virtual_pipeline == 1:
        total -= stream  # the output is freed once it is sent
    if first and parallel.tensor > 1:
        total += 9 * tokens  # ids within the rank's rows, and which are
    if last:
        total += head_gradients(model, parallel, work)
    rotations = {model.head_dim} if model.rope != "none" else set()
    rotations |= {model.state_dim} if model.rope == "unified" else set()
    return total + 4 * tokens * sum(rotations)  # cos and sin, float32


def layer_activations(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, layer: int, selective: bool
) -> int:
    """What one layer keeps of one micro-batch; `selective`: its mixer computes parts again."""
    tokens, item = work.tokens(parallel), work.itemsize
    stream = 2 * _stream_tokens(parallel, tokens) * model.hidden_size
    inputs = 2 * tokens * model.hidden_size
    mixer = _attention if model.is_attention(layer) else _ssd
    inner = tokens * model.intermediate_size // parallel.tensor * (3 if work.on_gpu else 4)
    return item * (stream + inputs + inner) + mixer(model, parallel, work, selective)


def _stream_tokens(parallel: ParallelConfig, tokens: int) -> int:
    """Tokens of the residual stream on one rank."""
    return tokens // parallel.tensor if parallel.sequence_parallel else tokens


def _attention(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, selective: bool
) -> int:
    tokens, item = work.tokens(parallel), work.itemsize
    heads, kv_heads = model.num_heads // parallel.tensor, model.num_kv_heads // parallel.tensor
    output = tokens * heads * model.head_dim * item
    if selective:
        return output + tokens * (heads + 2 * kv_heads) * model.head_dim * item
    statistics = 4 * tokens * heads
    context = parallel.context
    by_heads = context > 1 and exchanges_heads(model, parallel)
    if by_heads:  # whole rows of some heads; a key head that ranks share is on each of them
        kv_heads = max(kv_heads, context)
        output *= 2  # of whole rows, and of the rank's tokens
    elif context == 1 and not work.on_gpu:
        output *= 2  # of the documents one by one, and together
    return output + statistics + tokens * (heads + 2 * kv_heads) * model.head_dim * item


def exchanges_heads(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Whether context-parallel attention exchanges heads; else it is a ring."""
    heads, kv_heads = model.num_heads // parallel.tensor, model.num_kv_heads // parallel.tensor
    context = parallel.context
    return heads % context == 0 and (kv_heads % context == 0 or context % kv_heads == 0)


def _ssd(model: ModelConfig, parallel: ParallelConfig, work: Workload, selective: bool) -> int:
    tokens, item, context = work.tokens(parallel), work.itemsize, parallel.context
    heads, groups = model.num_heads // parallel.tensor, model.ssd_groups // parallel.tensor
    channels = heads * model.head_dim + 2 * groups * model.state_dim
    kept = tokens * item * (channels + heads + heads * model.head_dim)
    if selective:
        return kept
    if model.ssd_conv_width:  # its input, the taps, and its sum before and after silu
        kept += tokens * item * channels * (model.ssd_conv_width + 1)
    state = work.micro_batch_size * heads * model.head_dim * model.state_dim
    chunk = min(model.chunk_size or GPU_CHUNK[item], GPU_CHUNK[item])
    chunk = chunk if work.on_gpu else model.chunk_size or CPU_CHUNK
    states = -(-work.seq_len // context // chunk) + (not work.on_gpu)
    kept += item * state * states
    if work.on_gpu:  # a rotation table in 16 bits, and the document of every token
        kept += tokens * (4 + (min(item, 4) * model.state_dim if model.rope == "unified" else 0))
    if context > 1:  # what the ranks' states are made of, and what a token reads of them
        kept += 4 * state * (2 * context - 1 + context * (context > 2)) + 16 * tokens * heads
    return kept


def head_bytes(model: ModelConfig, parallel: ParallelConfig, work: Workload) -> int:
    """A block's logits, in float32 (in 16 bits beside what they came from, which ends as their
    gradient), and its gradients; those of the rank's rows are summed in float32."""
    vocab, hidden = model.padded_vocab_size // parallel.tensor, model.hidden_size
    item = work.itemsize
    block = min(work.tokens(parallel), head_block_tokens(vocab, work.on_gpu))
    logits = 4 * block * vocab + (item * block * vocab if item < 4 else 0)
    gradients = item * (block * vocab + (block + vocab) * hidden)
    return (4 - item) * vocab * hidden + max(logits, gradients)


def head_gradients(model: ModelConfig, parallel: ParallelConfig, work: Workload) -> int:
    """What the head's forward leaves for backward: gradients of hidden states and of its rows."""
    rows = work.tokens(parallel) + model.padded_vocab_size // parallel.tensor
    return rows * model.hidden_size * work.itemsize


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
