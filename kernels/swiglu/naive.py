"""Oracle of the SwiGLU product: the formula in float64, plain autograd."""

import torch
from torch import Tensor


def swiglu_naive(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) ⊙ up, of one shape; float64."""
    gate = gate.double()
    return gate / (1 + torch.exp(-gate)) * up.double()
