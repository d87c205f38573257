"""Causal attention over packed documents, through PyTorch's SDPA.

    o_t = Σ_j softmax_j(scale · q_t · k_j) v_j        j ≤ t in t's document; query head h reads
                                                      key head h // (Hq/Hkv)

An L × L mask is never built. CUDA in 16 bits has a variable-length kernel; elsewhere each document
is one SDPA call, and a batch whose rows are single documents is one call in all.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.checks import once_per_shape
from kernels.recording import is_recorded

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
    by_document = _recorded if is_recorded() and q.is_cpu else _by_document
    return by_document(flat_q, flat_k, flat_v, cu_seqlens, scale).view(q.shape)


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None
) -> Tensor:
    """[T, Hq, D], one call for each document that is not empty."""
    sizes = _sizes(cu_seqlens)
    # split has one backward for all its pieces; slices would each add a gradient of all tokens
    documents = zip(*(t.split(sizes) for t in (q, k, v)), strict=True)
    one = _padded if q.dtype in (torch.float16, torch.bfloat16) else _causal
    return torch.cat([one(a[None], b[None], c[None], scale)[0] for a, b, c in documents])


def _sizes(cu_seqlens: Tensor) -> list[int]:
    return [size for size in cu_seqlens.diff().tolist() if size]


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


# -- CPU attention as a custom operator, for recordings and torch.compile --------------------------


def _recorded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    """Run `_by_document` as one operator, which reads cu_seqlens whenever it is called."""
    out: Tensor = _forward(q, k, v, cu_seqlens, scale)[0]
    return out


@torch.library.custom_op("transxssm::attention_by_document", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return attention [T, Hq, D], and the log-sum-exp of its scores [Hq, T]."""
    parts = []
    for size, *document in _blocks(cu_seqlens, q, k, v):
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *document, 0.0, True, scale=scale
        )
        parts.append((out[0].transpose(0, 1)[:size], log_sums[0, :, :size]))
    outs, all_log_sums = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(all_log_sums, dim=1)


@torch.library.custom_op("transxssm::attention_by_document_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor,
    cu_seqlens: Tensor, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = []
    begin = 0
    for size, *document in _blocks(cu_seqlens, d_out, q, k, v, out):
        spare = document[0].shape[2] - size
        # so large that padding has the weight exp(score - 1e30) = 0
        padded = pad(log_sums[None, :, begin : begin + size], (0, spare), value=1e30)
        document_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *document, padded, 0.0, True, scale=scale
        )
        grads.append([t[0].transpose(0, 1)[:size] for t in document_grads])
        begin += size
    d_q, d_k, d_v = (torch.cat(parts) for parts in zip(*grads, strict=True))
    return d_q, d_k, d_v


def _blocks(cu_seqlens: Tensor, *tensors: Tensor) -> Iterator[Any]:
    """Yield the size of every document, and its part [1, H, size, D] of each tensor [T, H, D].

    In 16 bits the parts are padded as in `_padded`.
    """
    sizes = _sizes(cu_seqlens)
    is_short = tensors[0].dtype in (torch.float16, torch.bfloat16)
    for size, *parts in zip(sizes, *(t.split(sizes) for t in tensors), strict=True):
        spare = -size % DOCUMENT_BLOCK if is_short else 0
        yield size, *(pad(t, (0, 0, 0, 0, 0, spare)).transpose(0, 1)[None] for t in parts)


@_forward.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    return _like(q), q.new_empty(q.shape[1], q.shape[0], dtype=exact)


@_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_backward(d_out.contiguous(), *ctx.saved_tensors, ctx.scale), None, None


_forward.register_autograd(_gradients, setup_context=_save)


# --------------------------------------------------------------------------------------------------


@once_per_shape
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
