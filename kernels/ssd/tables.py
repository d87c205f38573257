"""What the Triton scan reads beside its inputs: the same for every layer of a micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanTables:
    """Made by `scan_tables` of these cu_seqlens, cos and sin.

    documents: int32 [B·L], the number of each token's document
    rotation:  [B, L, N], cos beside sin, or None; float16 for 16-bit inputs, else float32
    """

    cu_seqlens: Tensor
    cos: Tensor | None
    sin: Tensor | None
    documents: Tensor
    rotation: Tensor | None


def scan_tables(
    cu_seqlens: Tensor, rope: tuple[Tensor, Tensor] | None, tokens: int, dtype: torch.dtype
) -> ScanTables:
    """The tables for B·L = `tokens` and inputs of `dtype`.

    cu_seqlens, and cos and sin in `rope`, as `kernels.ssd.ssd.ssd` takes them.
    """
    cos, sin = rope or (None, None)
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    documents = torch.bucketize(token, cu_seqlens[1:].int(), right=True, out_int32=True)
    rotation = None
    if cos is not None and sin is not None:
        # for 16-bit B and C a float16 table is exact to an eighth of their rounding
        rotation = torch.cat((cos, sin), dim=-1).to(rotation_dtype(dtype))
    return ScanTables(cu_seqlens, cos, sin, documents, rotation)


def rotation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of rotations for inputs of `dtype`."""
    return torch.float32 if dtype == torch.float32 else torch.float16
