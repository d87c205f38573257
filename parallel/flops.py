"""Floating-point operations of the hybrid model, counted per token (a multiply-add is two).

Matrix products are counted exactly; elementwise work is not. Backward is twice forward.
"""

from parallel.config import ModelConfig

# Tokens of a chunk of the scan's kernels in 16 bits on Hopper and datacenter Blackwell, where
# chunk_size is no more than an upper bound (kernels.ssd.tiles). CPUs, whose rate is compared with
# no peak, run chunk_size as it is.
SCAN_CHUNK = 64


def layer_flops(model: ModelConfig, layer: int, seq_len: int) -> float:
    """Forward FLOPs per token of one decoder layer.

    Attention, causal: a token meets (seq_len + 1) / 2 keys on average, 2 products of head_dim each:
        4 · heads · head_dim · (seq_len + 1) / 2.
    SSD by chunks of Q tokens (paper, section 2; Mamba-2, section 6): within the chunk C·Bᵀ and its
    product with x are full Q × Q products, 2·Q·N per group and 2·Q·P per head; the chunk state
    (x bᵀ) and its read-out (S c) are 2·P·N per head each:
        groups · 2·Q·N + heads · (2·Q·P + 4·P·N).
    """
    heads, width, hidden = model.num_heads, model.head_dim, model.hidden_size
    feed_forward = 6 * hidden * model.intermediate_size
    if model.is_attention(layer):
        projections = 2 * hidden * width * (2 * heads + 2 * model.num_kv_heads)
        return feed_forward + projections + 2 * heads * width * (seq_len + 1)
    state, groups = model.state_dim, model.ssd_groups
    chunk = min(model.chunk_size or SCAN_CHUNK, SCAN_CHUNK, seq_len)
    projections = 2 * hidden * (2 * heads * width + 2 * groups * state + heads)
    scan = groups * 2 * chunk * state + heads * (2 * chunk * width + 4 * width * state)
    return feed_forward + projections + scan


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs per token of the output head."""
    return 2 * model.hidden_size * model.vocab_size


def training_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs per token; recomputation is not counted (model FLOPs)."""
    layers = sum(layer_flops(model, i, seq_len) for i in range(model.num_layers))
    return 3 * (layers + head_flops(model))
