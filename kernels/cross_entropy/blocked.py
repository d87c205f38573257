"""The cross entropy in PyTorch, for the CPU and as fallback.

Rows are taken in blocks that stay in cache, so that the many passes of which a softmax consists
read and write memory once. Arguments and formulas as in `kernels.cross_entropy.cross_entropy`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.cross_entropy.sizes import rows_at_once


def statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    """Largest logit, sum of exponentials relative to it, the label's logit: [3, T]."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    found = torch.empty(3, logits.shape[0], dtype=exact, device=logits.device)
    for part in _parts(logits):
        found[:, part] = _statistics(logits[part], labels[part] - first, valid)[0]
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
    for part in _parts(logits):
        label = labels[part]
        is_token = (label >= 0) & (label < vocabulary)
        of_ranks = None if statistics is None else statistics[:, :, part]
        out[0][part], out[1][part] = _finish_part(
            logits[part], label - first, is_token, weights[part], of_ranks, valid, z_loss, gradient
        )


def _finish_part(
    logits: Tensor,
    at: Tensor,
    is_token: Tensor,
    weight: Tensor,
    statistics: Tensor | None,
    valid: int,
    z_loss: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and missed tokens of some rows."""
    weight = weight.to(torch.promote_types(logits.dtype, torch.float32))
    if statistics is None:
        found, exponentials = _statistics(logits, at, valid)
        largest, total, of_label = found
    else:
        largest, total, of_label = _combined(statistics)
        if gradient:
            exponentials = _exponentials(logits[:, :valid].to(weight.dtype), largest, logits)
    log_total = total.log()
    if gradient:
        factor = weight * (1 + 2 * z_loss * (largest + log_total)) / total
        exponentials.mul_(factor[:, None])
        if valid:
            row = torch.arange(logits.shape[0], device=logits.device)
            here = (at >= 0) & (at < valid)
            exponentials[row, at.clamp(0, valid - 1)] -= torch.where(here, weight, 0.0)
        logits[:, :valid] = exponentials
        logits[:, valid:] = 0
    loss = log_total - torch.where(is_token, of_label - largest, 0.0)
    return loss * weight, torch.where((of_label < largest) | ~is_token, weight, 0.0)


def _statistics(logits: Tensor, at: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Statistics [3, t] of some rows, and their exponentials relative to the largest [t, valid].

    at int64 [t]: the labels' columns, maybe beyond those here.
    """
    columns, exact = logits.shape[1], torch.promote_types(logits.dtype, torch.float32)
    of_label = logits.gather(1, at.clamp(0, columns - 1)[:, None])[:, 0].to(exact)
    of_label = torch.where(at < valid, of_label, float("-inf"))  # a label in the padding
    of_label = torch.where((at >= 0) & (at < columns), of_label, 0.0)
    x = logits[:, :valid].to(exact)
    largest = x.amax(1) if valid else x.new_full(x.shape[:1], float("-inf"))
    exponentials = _exponentials(x, largest, logits)
    return torch.stack((largest, exponentials.sum(1), of_label)), exponentials


def _exponentials(x: Tensor, largest: Tensor, logits: Tensor) -> Tensor:
    """exp(x - largest) in x's memory, if x is not the logits themselves."""
    relative_to = _finite(largest)[:, None]
    own = x.dtype != logits.dtype
    return (x.sub_(relative_to) if own else x - relative_to).exp_()


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
    step = rows_at_once(columns, logits.is_cpu)
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))
