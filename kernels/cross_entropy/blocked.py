"""The cross entropy in PyTorch, for the CPU and as fallback.

Rows are taken in blocks that stay in cache, so that the many passes of which a softmax consists
read and write memory once. Arguments and formulas as in `kernels.cross_entropy.cross_entropy`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: larger leaves the cache, smaller pays for calls
# elsewhere calls cost more than passes, and a float32 copy of all logits more memory than there is
DEVICE_ELEMENTS = 1 << 26


def statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    """Largest logit, sum of exponentials relative to it, the label's logit: [3, T]."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    found = torch.empty(3, logits.shape[0], dtype=exact, device=logits.device)
    for part in _parts(logits):
        x = logits[part, :valid].to(exact)
        found[:, part] = _statistics(x, logits[part], labels[part] - first, valid)[0]
    return found


def finish(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    statistics: Tensor | None,
    out: tuple[Tensor, Tensor],
    first: int,
    valid: int,
    vocabulary: int,
    z_loss: float,
    gradient: bool,
) -> None:
    """All that `cross_entropy_` writes. statistics: of all ranks, [ranks, 3, T]; None: of one."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    for part in _parts(logits):
        x, label, weight = logits[part, :valid].to(exact), labels[part], weights[part].to(exact)
        at = label - first
        if statistics is None:
            found, exponentials = _statistics(x, logits[part], at, valid)
            largest, total, of_label = found
        else:
            largest, total, of_label = _combined(statistics[:, :, part])
            exponentials = torch.sub(x, _finite(largest)[:, None]).exp_() if gradient else x
        is_token = (label >= 0) & (label < vocabulary)
        log_total = total.log()
        loss = log_total - torch.where(is_token, of_label - largest, 0.0)
        out[0][part] = loss * weight
        out[1][part] = torch.where((of_label < largest) | ~is_token, weight, 0.0)
        if gradient:
            factor = weight * (1 + 2 * z_loss * (largest + log_total)) / total
            exponentials.mul_(factor[:, None])
            here = (at >= 0) & (at < valid)
            row = torch.arange(x.shape[0], device=x.device)
            if valid:
                exponentials[row, at.clamp(0, valid - 1)] -= torch.where(here, weight, 0.0)
            logits[part, :valid] = exponentials
            logits[part, valid:] = 0


def _statistics(x: Tensor, logits: Tensor, at: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Statistics [3, t] of some rows, and their exponentials relative to the largest [t, valid]."""
    columns = logits.shape[1]
    largest = x.amax(1) if valid else x.new_full(x.shape[:1], float("-inf"))
    exponentials = torch.sub(x, _finite(largest)[:, None]).exp_()
    of_label = logits.gather(1, at.clamp(0, columns - 1)[:, None])[:, 0].to(x.dtype)
    of_label = torch.where(at < valid, of_label, float("-inf"))  # a label in the padding
    of_label = torch.where((at >= 0) & (at < columns), of_label, 0.0)
    return torch.stack((largest, exponentials.sum(1), of_label)), exponentials


def _combined(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the whole vocabulary [t], from [ranks, 3, t]."""
    each, totals, of_label = statistics.unbind(1)
    largest = each.amax(0)
    return largest, (totals * (each - _finite(largest)).exp()).sum(0), of_label.sum(0)


def _finite(largest: Tensor) -> Tensor:
    """What exponentials are relative to: 0 where no logit is above -inf."""
    return torch.where(largest == float("-inf"), 0.0, largest)


def _parts(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    elements = BLOCK_ELEMENTS if logits.device.type == "cpu" else DEVICE_ELEMENTS
    step = max(1, elements // columns)
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))
