"""Oracle of the cross entropy: the formula in float64, plain autograd, the whole vocabulary."""

import torch
from torch import Tensor


def cross_entropy_naive(
    logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss and missed tokens [T], and the gradient of the logits [T, V]; float64.

    logits [T, V], of tokens alone; labels int64 [T]: one that is no token has the loss of the
    likeliest token; weights [T].
    """
    with torch.enable_grad():
        x = logits.detach().double().requires_grad_()
        largest = x.detach().amax(1)
        is_token = (labels >= 0) & (labels < x.shape[1])
        of_label = x.gather(1, labels.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
        of_label = torch.where(is_token, of_label, largest)
        log_sum = x.logsumexp(1)
        loss = (log_sum - of_label) * weights.double()
        objective = loss + z_loss * log_sum**2 * weights.double()
        (gradient,) = torch.autograd.grad(objective.sum(), x)
    missed = ((of_label < largest) | ~is_token).double() * weights.double()
    return loss.detach(), missed.detach(), gradient
