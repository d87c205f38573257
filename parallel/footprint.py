"""What a layer holds on one rank: parameters, and what it keeps of a micro-batch for backward.

Numbers that a layer keeps for backward, per token; H, I: the hidden and feed-forward widths,
W = heads · head_dim, t: the tensor-parallel size (H* is H / t under sequence parallelism):

    residual stream           2 H*: the layer's output and the stream between its halves
    inputs of projections     2 H*: one of each half
    SSD                       (2 W + 2 groups · state_dim + heads) / t: x, b, c, Δ and y; and
                              heads / t · head_dim · state_dim for every chunk of a row
    attention                 (2 W + 2 kv_heads · head_dim) / t: q, k, v and its output; and
                              4 heads / t bytes of softmax statistics
    feed-forward              3 I / t: gate, up and their product; on the CPU also silu(gate)

Selective recomputation keeps of a mixer what its projections give and take.
"""

from dataclasses import dataclass

from parallel.config import ModelConfig, ParallelConfig
from parallel.sizes import heads_are_shared_out

# Chunk lengths of the scans, which keep a state for each chunk: of the CPU's, and of the kernels on
# an H100 by bytes of a number (kernels/ssd/chunked.py, kernels/ssd/tiles.py)
CPU_CHUNK = 64
GPU_CHUNK = {2: 64, 4: 16}


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

    @property
    def tokens_per_step(self) -> int:
        """Of all data-parallel ranks."""
        return self.data * self.micro_batches * self.micro_batch_size * self.seq_len

    def shards(self, parallel: ParallelConfig) -> int:
        """Ranks over which optimizer state is divided."""
        return self.data * parallel.context if parallel.zero_stage else 1


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


def embedding_parameters(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Elements of an embedding or head table on one tensor-parallel rank."""
    return model.padded_vocab_size // parallel.tensor * model.hidden_size


def chunks_in_flight(parallel: ParallelConfig, micro_batches: int, stage: int) -> int:
    """Forward passes of chunks that a stage has made before its first backward (1F1B; Narayanan et
    al. 2021, arXiv 2104.04473, section 2.2)."""
    after, chunks = parallel.pipeline - stage - 1, parallel.virtual_pipeline
    warmup = after if chunks == 1 else 2 * after + (chunks - 1) * parallel.pipeline
    return min(warmup + 1, micro_batches * chunks)


def layer_activations(
    model: ModelConfig, parallel: ParallelConfig, work: Workload, layer: int, selective: bool
) -> int:
    """What one layer keeps of one micro-batch; `selective`: its mixer computes parts again."""
    tokens, item = work.tokens(parallel), work.itemsize
    stream = 2 * stream_tokens(parallel, tokens) * model.hidden_size
    inputs = stream  # of the halves' projections: gathered again where tokens are split
    mixer = _attention if model.is_attention(layer) else _ssd
    inner = tokens * model.intermediate_size // parallel.tensor * (3 if work.on_gpu else 4)
    return item * (stream + inputs + inner) + mixer(model, parallel, work, selective)


def stream_tokens(parallel: ParallelConfig, tokens: int) -> int:
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
    return heads_are_shared_out(heads, kv_heads, parallel.context)


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
    if context > 1:  # what the ranks' states are made of, and what a token reads of them
        kept += 4 * state * (2 * context - 1 + context * (context > 2)) + 16 * tokens * heads
    return kept
