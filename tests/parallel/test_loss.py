"""The output head in blocks of tokens against plain torch, which makes all logits at once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ranks import run_ranks

TOKENS, HIDDEN, ROWS, VALID = 37, 8, 24, 45  # rows of each of two ranks, of which 45 are tokens
BLOCK = 5


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, the whole head weight, labels and loss_mask."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(2 * ROWS, HIDDEN, generator=generator)
    labels = torch.randint(0, VALID, (TOKENS,), generator=generator)
    # the likeliest and the one after it: else nearly all would be missed, and by far
    first, second = F.linear(h, weight)[:, :VALID].topk(2).indices.T
    labels[::4], labels[1::4] = first[::4], second[1::4]
    return h, weight, labels, (torch.rand(TOKENS, generator=generator) < 0.8).float()


def head_in_blocks(ranks: int, z_loss: float) -> tuple[list[Tensor], int]:
    """Loss, loss by token, both gradients, then what head_scores says; and products made."""
    from parallel import loss, sizes
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment

    launch = launch_from_environment()
    init_distributed(launch, prepare_host())
    init_groups(ParallelConfig(tensor=ranks))
    sizes.CPU_BLOCK_TOKENS, sizes.LOGITS_ELEMENTS = BLOCK, 1
    calls, cross_entropy_ = [0], loss.cross_entropy_

    def counted(logits: Tensor, *args: Any, **kwargs: Any) -> None:
        assert logits.shape[0] <= BLOCK
        calls[0] += 1
        cross_entropy_(logits, *args, **kwargs)

    loss.cross_entropy_ = counted
    h, whole, labels, mask = inputs()
    size = 2 * ROWS // ranks
    first = launch.rank * size
    weight = whole[first : first + size].clone().requires_grad_()
    valid, h = min(size, VALID - first), h.requires_grad_()
    total, by_token = loss.head_loss(h, weight, labels, mask, valid, z_loss)
    d_h, d_weight = torch.autograd.grad(3 * total, (h, weight))
    scores = loss.head_scores(h.detach(), weight.detach(), labels, mask, valid)
    return [total.detach(), by_token, d_h, d_weight, *scores], calls[0]


@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_blocks_add_up(ranks: int, z_loss: float) -> None:
    h, weight, labels, mask = (t.double() if t.is_floating_point() else t for t in inputs())
    h, weight = h.requires_grad_(), weight.requires_grad_()
    logits = F.linear(h, weight)[:, :VALID]
    by_token = F.cross_entropy(logits, labels, reduction="none") * mask
    expected = float(by_token.sum().detach())
    objective = by_token + z_loss * logits.logsumexp(1) ** 2 * mask
    d_h, d_weight = torch.autograd.grad(3 * objective.sum(), (h, weight))
    missed = (logits.argmax(1) != labels) * mask
    found = run_ranks(ranks, head_in_blocks, ranks, z_loss)
    for (total, tokens, part_h, _, scored, scored_tokens, scored_missed), calls in found:
        assert calls == 2 * -(-TOKENS // BLOCK)
        for loss_ in (total, scored):
            assert float(loss_) == pytest.approx(expected, rel=1e-5)
        for each in (tokens, scored_tokens):
            assert torch.allclose(each.double(), by_token, rtol=1e-4, atol=1e-5)
        assert torch.equal(scored_missed.double(), missed.double())
        if ranks == 1:
            assert torch.allclose(part_h.double(), d_h, rtol=1e-4, atol=1e-5)
    part = sum(parts[2] for parts, _ in found)  # of a rank's rows of the head alone
    assert torch.allclose(part.double(), d_h, rtol=1e-4, atol=1e-5)
    rows = torch.cat([parts[3] for parts, _ in found])
    assert torch.allclose(rows.double(), d_weight, rtol=1e-4, atol=1e-5)


def bf16_head_gradient(block: int) -> Tensor:
    """Of tokens that all have the same label, so that their shares of one row add up."""
    from parallel import sizes
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.loss import head_loss

    init_distributed(launch_from_environment(), prepare_host())
    init_groups(ParallelConfig())
    sizes.CPU_BLOCK_TOKENS, sizes.LOGITS_ELEMENTS = block, 1
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(400, HIDDEN, generator=generator).abs().bfloat16()
    weight = torch.randn(ROWS, HIDDEN, generator=generator).bfloat16().requires_grad_()
    labels = torch.zeros(400, dtype=torch.int64)
    total, _ = head_loss(h.requires_grad_(), weight, labels, torch.ones(400), ROWS)
    return torch.autograd.grad(total, weight)[0]


def twice_the_backward() -> str:
    """What autograd says of a second pass over gradients that the first has scaled."""
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.loss import head_loss

    init_distributed(launch_from_environment(), prepare_host())
    init_groups(ParallelConfig())
    h, weight, labels, mask = inputs()
    total, _ = head_loss(h.requires_grad_(), weight.requires_grad_(), labels, mask, VALID)
    (total * 2).backward(retain_graph=True)
    try:
        (total * 2).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_gradients_are_not_scaled_twice() -> None:
    assert "modified by an inplace operation" in run_ranks(1, twice_the_backward)[0]


def test_blocks_of_a_bf16_head_add_up_in_float32() -> None:
    whole, parts = (run_ranks(1, bf16_head_gradient, block)[0].double() for block in (400, 2))
    assert (parts - whole).norm() < 3e-3 * whole.norm()
