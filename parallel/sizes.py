"""Sizes of buffers that the engines allocate and the memory model counts. Imports no torch."""

BUCKET_ELEMENTS = 50_000_000  # of gradients reduced, or updated parameters gathered, at once
GATHERED_ELEMENTS = 1_000_000_000  # of parameters that ZeRO 3 keeps gathered for their next use
LOGITS_ELEMENTS = 1 << 22  # of the output head's block, where it is taller: 8 MiB in bfloat16
# Blocks must be tall enough for their products to fill a GPU, and few enough for the sums of their
# weight gradients; on a CPU the gradient of a head of 32,768 rows takes 1.6 times as long (bf16) in
# blocks of 128 tokens as of 1,024
GPU_BLOCK_TOKENS, CPU_BLOCK_TOKENS = 8192, 1024


def head_block_tokens(rows: int, on_gpu: bool) -> int:
    """Tokens of which the output head has logits at once, for a head weight of so many rows."""
    return max(GPU_BLOCK_TOKENS if on_gpu else CPU_BLOCK_TOKENS, LOGITS_ELEMENTS // rows)


def heads_are_shared_out(heads: int, kv_heads: int, context: int) -> bool:
    """Whether so many heads on a tensor-parallel rank can be exchanged for tokens over `context`
    ranks, of which those that share a key head each get it."""
    return heads % context == 0 and (kv_heads % context == 0 or context % kv_heads == 0)
