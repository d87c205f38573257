"""Matrix products that are summed in float32."""

import torch
from torch import Tensor

from kernels.paths import FLOAT32_SUMS, is_off


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, a [m, k], b [k, n] of one dtype; float32 [m, n] for 16 bits, in place.

    Without a total, the product alone. One launch on CUDA, whose products are summed in float32
    anyway and need not be rounded before; elsewhere a 16-bit product is rounded to its dtype.
    """
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b if total is None else total.addmm_(a, b)
    if not sums_inside(a):
        product = a @ b
        return product.float() if total is None else total.add_(product)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def sums_inside(a: Tensor) -> bool:
    """Whether a product of 16-bit matrices can be added to a float32 one as it is computed."""
    return can_sum_inside(a.device) and not is_off(FLOAT32_SUMS)


def can_sum_inside(device: torch.device) -> bool:
    """Whether PyTorch has such products for a device. Meta tensors stand for those of a GPU."""
    return device.type != "cpu" and torch.version.hip is None
