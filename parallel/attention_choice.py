"""Choice of the attention kernels of a GPU, made once in each process, before training.

Packed rows run FlashAttention-2, or a newer version if its package is installed and its results are
right. cuDNN's kernels for packed rows are not among the choices: PyTorch uses them only without a
window, and its interface expresses causal attention as a window. If every row is a single document,
SDPA chooses the kernel.
"""

import importlib.util
import logging

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from kernels.attention import attention
from parallel.config import ModelConfig
from parallel.groups import host_group

log = logging.getLogger("transxssm")

PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
"""Module of each implementation, by PyTorch's name for it."""
CHOICES = {9: ("FA3", "FA4"), 10: ("FA4",)}
"""Implementations to try, best first, by major compute capability."""
TOLERANCE = 3e-2
"""Relative RMS difference from float32. Rounding to bf16 makes a fifth of it."""


def choose_attention(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Activate the best implementation of packed attention; return its name, "" for PyTorch's own.

    Collective: where ranks would differ, all use PyTorch's own, and rank 0 warns.
    """
    mine = _activated(model, device, dtype)
    of_ranks = [""] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine, group=host_group())
    if len(set(of_ranks)) > 1:
        if mine:
            restore_flash_attention_impl()
        if dist.get_rank() == 0:
            names = ", ".join(sorted({name or "PyTorch's own" for name in of_ranks}))
            log.warning(
                "packed attention would be %s on different ranks; all use PyTorch's own instead "
                "(install the same packages on all nodes)",
                names,
            )
        return ""
    if device.type == "cuda" and dist.get_rank() == 0:
        log.info("attention of packed rows: %s", mine or "PyTorch's own FlashAttention")
    return mine


def _activated(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Activate the best implementation in this process and return its name."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    major, _ = torch.cuda.get_device_capability(device)
    for name in CHOICES.get(major, ()):
        if not _is_installed(PACKAGES[name]):
            continue
        try:
            activate_flash_attention_impl(name)
            fault = difference(model, device, dtype)
        except Exception as error:  # a foreign package may raise anything
            fault = f"{type(error).__name__}: {error}".partition("\n")[0]
        if fault is None:
            return name
        restore_flash_attention_impl()
        log.warning("%s of package %s is not used: %s", name, PACKAGES[name], fault)
    return ""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def difference(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return how attention or its gradients differ from those in float32, or None."""
    for boundaries in ([0, 5, 140, 140, 203, 280], [0, 140, 280]):
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
        found, expected = (_computed(model, cu_seqlens, t) for t in (dtype, torch.float32))
        for name, one, other in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
            error = float((one.float() - other).norm() / other.norm())
            if not error <= TOLERANCE:  # or not a number
                return f"its {name} differs from that in float32 by {error:.2g}"
    return None


def _computed(model: ModelConfig, cu_seqlens: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Compute attention of two rows and its gradients, of the same numbers in each call."""
    generator = torch.Generator(cu_seqlens.device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (2, 140, heads, model.head_dim)
        numbers = torch.randn(shape, generator=generator, device=cu_seqlens.device)
        # rounded alike in every dtype
        return numbers.bfloat16().to(dtype).requires_grad_()

    q, k, v = (normal(n) for n in (model.num_heads, model.num_kv_heads, model.num_kv_heads))
    out = attention(q, k, v, cu_seqlens)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), normal(model.num_heads).detach())]
