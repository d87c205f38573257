"""Causal attention over packed documents, through PyTorch's SDPA.

    o_t = Σ_j softmax_j(scale · q_t · k_j) v_j        j ≤ t in t's document; query head h reads
                                                      key head h // (Hq/Hkv)

An L × L mask is never built. CUDA in 16 bits has a variable-length kernel; elsewhere each document
is one SDPA call, and a batch whose rows are single documents is one call in all.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

# oneDNN keeps a compiled product of every size it has met (about a megabyte each), and documents
# have as many sizes as a row has tokens: on a CPU in 16 bits they are padded to multiples of this.
DOCUMENT_BLOCK = 64


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend within documents; [B, L, Hq, D] in q's dtype.

    q [B, L, Hq, D], k, v [B, L, Hkv, D], of one floating dtype; cu_seqlens [segments+1] int32,
    borders over the flattened B·L tokens with every row start among them; scale defaults to 1/√D.

    Raises ValueError for wrong shapes or devices, TypeError for wrong dtypes. On the CPU, and in
    float32 on CUDA, the borders are read on the host.
    """
    _check(q, k, v, cu_seqlens)
    batch, length = q.shape[:2]
    if cu_seqlens.numel() == batch + 1:  # every row start is a border, so rows are documents
        return _causal(q, k, v, scale)
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))  # [B·L, H, D]
    if q.device.type != "cpu" and q.dtype in (torch.float16, torch.bfloat16):
        borders = cu_seqlens.int()
        # a row bounds its documents: the longest one is not worth waiting for the device
        out = varlen_attn(
            flat_q, flat_k, flat_v, borders, borders, length, length,
            scale=scale, window_size=(-1, 0), enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.view(q.shape)
    sizes = cu_seqlens.diff().tolist()
    # split has one backward for all its pieces; slices would each add a gradient of B·L tokens
    documents = zip(*(t.split(sizes) for t in (flat_q, flat_k, flat_v)), strict=True)
    one = _padded if q.dtype in (torch.float16, torch.bfloat16) else _causal
    return torch.cat([one(a[None], b[None], c[None], scale)[0] for a, b, c in documents]).view(
        q.shape
    )


def _padded(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """As `_causal`, computed on rows of a multiple of DOCUMENT_BLOCK tokens.

    The padding follows the document, so that the causal mask hides it from every token.
    """
    length = q.shape[1]
    if spare := -length % DOCUMENT_BLOCK:
        q, k, v = (pad(t, (0, 0, 0, 0, 0, spare)) for t in (q, k, v))
    return _causal(q, k, v, scale)[:, :length]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """[B, L, H, D], each row one document."""
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, L, Hq, D]")
    if not q.is_floating_point():
        raise TypeError(f"q has dtype {q.dtype}; expected a floating-point dtype")
    batch, length, heads, dim = q.shape
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != dim or heads % k.shape[2]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}; expected [{batch}, {length}, Hkv, {dim}]"
            f" with Hkv dividing {heads} query heads"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected k's, {tuple(k.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected q's, {q.dtype}")
    for name, tensor in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {q.device}, where q is")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < batch + 1:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected [segments+1]"
            f" with at least one segment for each of {batch} rows"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected torch.int32")
