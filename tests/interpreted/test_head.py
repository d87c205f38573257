"""The output head with the Triton cross entropy, over tensor-parallel ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ranks import run_ranks

TOKENS, HIDDEN, VOCABULARY, VALID = 37, 8, 48, 45


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, the whole head weight, labels and loss_mask."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VALID, (TOKENS,), generator=generator)
    return h, weight, labels, (torch.rand(TOKENS, generator=generator) < 0.8).float()


def head(ranks: int, z_loss: float) -> list[Tensor]:
    """Loss by token, both gradients, then what head_scores says; in blocks of 16 tokens."""
    from kernels.audit.interpreter import install
    from kernels.cross_entropy import fused
    from kernels.dispatch import chosen
    from parallel import loss, sizes
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment

    install()
    launch = launch_from_environment()
    init_distributed(launch, prepare_host())
    init_groups(ParallelConfig(tensor=ranks))
    sizes.CPU_BLOCK_TOKENS, sizes.LOGITS_ELEMENTS, fused.BLOCK = 16, 1, 16
    h, whole, labels, mask = inputs()
    weight = whole.chunk(ranks)[launch.rank].clone().requires_grad_()
    valid = VALID - launch.rank * weight.shape[0]
    total, by_token = loss.head_loss(h.requires_grad_(), weight, labels, mask, valid, z_loss)
    gradients = torch.autograd.grad(3 * total, (h, weight))
    scores = loss.head_scores(h.detach(), weight.detach(), labels, mask, valid)
    assert chosen["cross_entropy"] == {"triton"}
    return [by_token, *gradients, *scores]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_vocabulary(ranks: int) -> None:
    h, weight, labels, mask = (t.double() if t.is_floating_point() else t for t in inputs())
    logits = F.linear(h.requires_grad_(), weight.requires_grad_())[:, :VALID]
    by_token = F.cross_entropy(logits, labels, reduction="none") * mask
    objective = by_token + 0.05 * logits.logsumexp(1) ** 2 * mask
    d_h, d_weight = torch.autograd.grad(3 * objective.sum(), (h, weight))
    missed = (logits.argmax(1) != labels) * mask
    found = run_ranks(ranks, head, ranks, 0.05)
    for tokens, _, _, _, scored, scored_missed in found:
        torch.testing.assert_close(tokens.double(), by_token.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(scored, tokens)
        assert torch.equal(scored_missed.double(), missed)
    part_h = sum(parts[1] for parts in found)
    torch.testing.assert_close(part_h.double(), d_h, rtol=1e-4, atol=1e-5)
    rows = torch.cat([parts[2] for parts in found])
    torch.testing.assert_close(rows.double(), d_weight, rtol=1e-4, atol=1e-5)
