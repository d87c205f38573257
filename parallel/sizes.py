"""Sizes of buffers that the engines allocate and the memory model counts. Imports no torch."""

BUCKET_ELEMENTS = 50_000_000  # of gradients reduced, or updated parameters gathered, at once
GATHERED_ELEMENTS = 1_000_000_000  # of parameters that ZeRO 3 keeps gathered for their next use
LOGITS_ELEMENTS = 1 << 22  # of the output head's block: 16 MiB in float32, about a CPU's cache
GPU_BLOCK_TOKENS = 2048  # on a GPU blocks must be tall enough for their products to fill it


def head_block_tokens(rows: int, on_gpu: bool) -> int:
    """Tokens of which the output head has logits at once, for a head weight of so many rows."""
    return max(GPU_BLOCK_TOKENS if on_gpu else 1, LOGITS_ELEMENTS // rows)
