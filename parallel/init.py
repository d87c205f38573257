"""Initial weights: a function of the parameter's global name and the seed alone.

Every rank draws the whole tensor and keeps its part, so every layout starts from identical weights.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from parallel.config import ModelConfig
from parallel.params import ParamInfo

DT_MIN, DT_MAX = 1e-3, 1e-1  # range of Δ at initialisation (Mamba-2)
A_MIN, A_MAX = 1.0, 16.0  # range of -A at initialisation (Mamba-2)


def initial_tensor(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of a parameter, float32 on the CPU (DESIGN section 1, Init).

    Projections and embeddings are N(0, init_std), output projections scaled by 1/√(2·num_layers);
    A_log = log U[1, 16]; dt_bias = softplus⁻¹ of log-uniform [1e-3, 1e-1]; D, norms and residual
    weights are 1; convolutions are uniform in ±1/√width.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind == "A_log":
        return torch.empty(shape).uniform_(A_MIN, A_MAX, generator=generator).log_()
    if kind == "dt_bias":
        log_dt = torch.empty(shape).uniform_(
            math.log(DT_MIN), math.log(DT_MAX), generator=generator
        )
        return torch.log(torch.expm1(log_dt.exp()))
    if kind == "conv":
        bound = 1 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if len(shape) == 1:
        return torch.ones(shape)
    std = model.init_std
    if kind in ("o_proj", "out_proj", "down_proj"):
        std /= math.sqrt(2 * model.num_layers)
    return torch.empty(shape).normal_(0, std, generator=generator)


@torch.no_grad()
def initialize(
    stage: nn.Module, infos: dict[str, ParamInfo], model: ModelConfig, seed: int
) -> None:
    """Fill a stage's parameters in place. Padding rows of the vocabulary are zero."""
    for name, parameter in stage.named_parameters():
        info = infos[name]
        whole = initial_tensor(name, info.global_shape, model, seed)
        if len(info.ranges) != 1 or info.ranges[0].length != info.local_shape[info.dim]:
            parameter.zero_()
        for part in info.ranges:
            parameter.narrow(info.dim, part.local, part.length).copy_(
                whole.narrow(info.dim, part.start, part.length)
            )
