"""Softmax cross entropy of logits that their gradient replaces.

    p_t    = softmax(x_t)          lse_t = log Σ_j exp(x_tj)          over the tokens j < valid
    loss_t = w_t (lse_t - x_t[label_t])
    x_tj  ← w_t (p_tj (1 + 2 z lse_t) - [j = label_t])          0 for j ≥ valid

which is the gradient of Σ_t loss_t + z w_t lse_t². The second term, z-loss (PaLM, OLMo), keeps
log-normalisers near zero and is no part of the loss. Float32 inside, whatever the logits' dtype.

Where the vocabulary is split over ranks, each computes three statistics of its columns: the largest
logit, the sum of exponentials relative to it, and the label's logit (0 on other ranks). All ranks
gather those of all, and combine them in the same order.
"""

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.checks import check_floating, check_tensor
from kernels.cross_entropy import blocked
from kernels.cross_entropy.naive import cross_entropy_naive
from kernels.dispatch import Choice, choose
from kernels.target import launch_on


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    valid: int,
    out: tuple[Tensor, Tensor],
    z_loss: float = 0.0,
    gradient: bool = True,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write every token's loss, and its weight where another token than the label is likelier,
    into `out`, both float32 [T]; with `gradient`, replace the logits by their gradient.

    logits [T, V], rows contiguous; labels int64 [T], in the whole vocabulary; weights float32 [T];
    valid: columns that are tokens, the rest being padding. group: ranks that the vocabulary is
    split over, with V columns each; None: one rank has it all. Collective with a group.

    Raises ValueError for a wrong shape, stride or device, TypeError for a wrong dtype.
    """
    rows, columns = _check(logits, labels, weights, out)
    ranks = 1 if group is None else group.size()
    first = 0 if group is None else group.rank() * columns
    valid = min(max(valid, 0), columns)
    unsupported = "Triton kernels compute in float32, not float64"
    choice = choose(
        "cross_entropy", logits.device, unsupported if logits.dtype == torch.float64 else None
    )
    if rows == 0:
        return
    if choice == "naive":
        _naive(logits, labels, weights, valid, out, z_loss, gradient, group)
        return
    implementation = implementation_of(choice)
    with launch_on(logits):
        statistics = None
        if group is not None and ranks > 1:
            statistics = _gathered(implementation.statistics(logits, labels, first, valid), group)
        implementation.finish(
            logits,
            labels,
            weights,
            statistics,
            out,
            first,
            valid,
            ranks * columns,
            z_loss,
            gradient,
        )


def _gathered(statistics: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's statistics [3, T]: [ranks, 3, T]. Collective."""
    gathered = statistics.new_empty(group.size() * 3, statistics.shape[1])
    dist.all_gather_into_tensor(gathered, statistics, group=group)
    return gathered.view(-1, *statistics.shape)


def implementation_of(choice: Choice) -> ModuleType:
    """The module of the two halves, `statistics` and `finish`; of Triton or of PyTorch."""
    if choice == "triton":
        from kernels.cross_entropy import fused

        return fused
    return blocked


def _naive(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    valid: int,
    out: tuple[Tensor, Tensor],
    z_loss: float,
    gradient: bool,
    group: dist.ProcessGroup | None,
) -> None:
    """Every rank computes the whole vocabulary and keeps its own columns."""
    parts = [logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= valid,
                                float("-inf"))]  # fmt: skip
    rank = 0
    if group is not None:
        mine, rank = parts[0], group.rank()
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine, group=group)
    *results, whole = cross_entropy_naive(torch.cat(parts, 1), labels, weights, z_loss)
    for target, result in zip(out, results, strict=True):
        target.copy_(result)
    if gradient:
        logits.copy_(whole.split(logits.shape[1], 1)[rank])


def _check(
    logits: Tensor, labels: Tensor, weights: Tensor, out: tuple[Tensor, Tensor]
) -> tuple[int, int]:
    """Rows and columns of the logits."""
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected [T, V]")
    check_floating("logits", logits)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits have strides {logits.stride()}; their rows must be contiguous")
    rows, columns = logits.shape
    check_tensor("labels", labels, (rows,), (torch.int64,), logits.device)
    for name, tensor in (("weights", weights), ("out[0]", out[0]), ("out[1]", out[1])):
        check_tensor(name, tensor, (rows,), (torch.float32,), logits.device)
    return rows, columns
