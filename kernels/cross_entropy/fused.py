"""The cross entropy in Triton: one launch, or two with a gather between them over ranks.

A program takes a token. It walks over the logits once for the statistics and once for the gradient,
the second time from the end, so that what it read last is still in the cache. Arguments and
formulas as in `kernels.cross_entropy.cross_entropy`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Two accesses of 128 bits a thread for 16-bit logits. Many threads a token: the fewer tokens are
# under way, the more of their logits a cache still holds for the second walk.
NUM_WARPS = 16
BLOCK = NUM_WARPS * 32 * 16


def statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    """Largest logit, sum of exponentials relative to it, the label's logit: [3, T]."""
    rows, columns = logits.shape
    found = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    statistics_kernel[(rows,)](
        logits, labels, found, rows, columns, first, valid, logits.stride(0),
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
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
    rows, columns = logits.shape
    ranks = 1 if statistics is None else statistics.shape[0]
    cross_entropy_kernel[(rows,)](
        logits, labels, weights, statistics, *out,
        rows, columns, first, valid, vocabulary, logits.stride(0), z_loss,
        RANKS=ranks, MOST_RANKS=triton.next_power_of_2(ranks), GRADIENT=gradient, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def traffic(rows: int, columns: int, itemsize: int, ranks: int) -> tuple[int, int]:
    """Bytes loaded and stored by one rank, gradient included, its columns being all tokens."""
    logits = rows * columns * itemsize
    loaded, stored = 2 * logits + rows * (itemsize + 8 + 4), logits + rows * 2 * 4
    if ranks > 1:  # statistics leave one launch and enter the other, as the label does
        loaded += rows * (ranks * 3 * 4 + 8)
        stored += rows * 3 * 4
    return loaded, stored


@triton.jit
def statistics_kernel(
    logits, labels, statistics, rows, columns, first, valid, stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(labels + row) - first
    largest, total, of_label = _statistics(logits + row * stride, at, columns, valid, BLOCK)
    tl.store(statistics + row, largest)
    tl.store(statistics + rows + row, total)
    tl.store(statistics + 2 * rows + row, of_label)


@triton.jit
def cross_entropy_kernel(
    logits, labels, weights, statistics, losses, missed,
    rows, columns, first, valid, vocabulary, stride, z_loss,
    RANKS: tl.constexpr, MOST_RANKS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    weight = tl.load(weights + row)
    if statistics is None:
        largest, total, of_label = _statistics(logits, label - first, columns, valid, BLOCK)
    else:
        rank = tl.arange(0, MOST_RANKS)
        there = rank < RANKS
        statistics += rank * 3 * rows + row
        each = tl.load(statistics, mask=there, other=-float("inf"))
        totals = tl.load(statistics + rows, mask=there, other=0.0)
        of_label = tl.sum(tl.load(statistics + 2 * rows, mask=there, other=0.0), 0)
        largest = tl.max(each, 0)
        total = tl.sum(totals * tl.exp(each - _finite(largest)), 0)
    is_token = (label >= 0) & (label < vocabulary)
    log_total = tl.log(total)
    loss = log_total - tl.where(is_token, of_label - largest, 0.0)
    tl.store(losses + row, loss * weight)
    tl.store(missed + row, tl.where((of_label < largest) | (is_token == 0), weight, 0.0))
    if GRADIENT:
        factor = weight * (1 + 2 * z_loss * (largest + log_total)) / total
        relative_to = _finite(largest)
        blocks = tl.cdiv(columns, BLOCK)
        for block in range(0, blocks):
            column = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
            y = tl.exp(x - relative_to) * factor
            y -= tl.where(column == label - first, weight, 0.0)
            y = tl.where(column < valid, y, 0.0)
            tl.store(logits + column, y.to(logits.dtype.element_ty), mask=column < columns)


@triton.jit
def _statistics(logits, at, columns, valid, BLOCK: tl.constexpr):
    """Of one token, whose label is in column `at`."""
    # before the gradient is written there
    inside = tl.minimum(tl.maximum(at, 0), columns - 1)
    of_label = tl.load(logits + inside).to(tl.float32)
    of_label = tl.where(at < valid, of_label, -float("inf"))  # a label in the padding
    of_label = tl.where((at >= 0) & (at < columns), of_label, 0.0)
    largest = tl.full((), -float("inf"), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # by columns, whose number the compiler knows to be a multiple of 16, and not by valid
        x = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
        x = tl.where(column < valid, x, -float("inf"))
        larger = tl.maximum(largest, tl.max(x, 0))
        relative_to = _finite(larger)
        totals = totals * tl.exp(largest - relative_to) + tl.exp(x - relative_to)
        largest = larger
    return largest, tl.sum(totals, 0), of_label


@triton.jit
def _finite(largest):
    """What exponentials are relative to: 0 where no logit is above -inf."""
    return tl.where(largest == -float("inf"), 0.0, largest)
