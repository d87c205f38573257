"""The tensor-parallel building blocks of a decoder layer, on Megatron-core's linear layers.

Inside a stage hidden states are flat: [T, 1, hidden] with T = B·L tokens of the micro-batch (T / tp
under sequence parallelism), so that sequence-parallel scatter and pipeline sends split tokens and
nothing is ever transposed.

    RMSNorm(h) = h / sqrt(mean(h²) + eps) ⊙ w
    SwiGLU(u)  = W_down(silu(W_gate u) ⊙ W_up u)
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.norm.norm import add_rms_norm, branch_rms_norm, weighted_residual
from kernels.swiglu.swiglu import swiglu
from parallel.projections import RowLinear, project

Result = TypeVar("Result")


def enter_tensor_parallel(h: Tensor, config: ModelParallelConfig) -> Tensor:
    """All tokens on every tensor-parallel rank; backward sums the gradient over the group."""
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(h)
    return copy_to_tensor_model_parallel_region(h)


def column_linear(in_size: int, out_size: int, config: ModelParallelConfig) -> ColumnParallelLinear:
    """W [out, in] split over `out`, for `parallel.projections.project`."""
    linear = ColumnParallelLinear(
        in_size,
        out_size,
        config=replace(config, sequence_parallel=False),
        init_method=_left_to_init,
        bias=False,
        disable_grad_reduce=True,
    )
    mark_split(linear.weight, 0)
    return linear


def row_linear(in_size: int, out_size: int, config: ModelParallelConfig) -> RowLinear:
    """W [out, in] split over `in`; sums (and scatters) its output over the group."""
    linear = RowLinear(
        in_size,
        out_size,
        config=config,
        init_method=_left_to_init,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    mark_split(linear.weight, 1)
    return linear


def mark_split(weight: Tensor, dim: int) -> None:
    """Say that tensor-parallel ranks hold parts of `weight` along `dim`.

    Megatron-core before 0.19 says so only of weights that it initialises itself.
    """
    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, True, dim, 1)


def _left_to_init(weight: Tensor) -> None:
    """Weights are filled by parallel.init once the whole stage stands."""


def head_parameter(size: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A per-head vector [heads / tp], split like the heads."""
    parameter = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
    mark_split(parameter, 0)
    return parameter


def recomputed(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args), of which backward keeps the arguments alone and computes the rest again."""
    if not torch.is_grad_enabled():
        return function(*args)
    result: Result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result


class ReplicatedScale(nn.Module):
    """A per-channel weight [hidden] used on every token, whole on every tensor-parallel rank.

    Under sequence parallelism each rank sees its own tokens only, so the weight's gradient is
    summed over the group: inside autograd, at the point of use.
    """

    def __init__(self, size: int, config: ModelParallelConfig, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))
        self.sequence_parallel = config.sequence_parallel

    def scale(self) -> Tensor:
        """The weight [hidden], with the gradient sum where tokens are split."""
        if self.sequence_parallel:
            return copy_to_tensor_model_parallel_region(self.weight)
        return self.weight


class RMSNorm(ReplicatedScale):
    """Root-mean-square normalisation over channels; statistics in float32."""

    def __init__(
        self, size: int, eps: float, config: ModelParallelConfig, device: torch.device
    ) -> None:
        super().__init__(size, config, device)
        self.eps = eps

    def forward(
        self, h: Tensor, update: Tensor | None = None, residual_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """h [..., hidden] → h, for its next reader, and its norm; for WeightedResidual,
        h' = r ⊙ h + update and its norm."""
        if update is None or residual_weight is None:
            return branch_rms_norm(h, self.scale(), self.eps)
        return add_rms_norm(h, update, residual_weight, self.scale(), self.eps)


class WeightedResidual(ReplicatedScale):
    """h' = r ⊙ h + update, with a learnable weight r per channel, and the norm that reads h'.

    The norm runs inside this module's forward: one pass over memory computes both, and ZeRO-3
    gathers a weight only around its own module's forward and backward.
    """

    def forward(
        self, h: Tensor, update: Tensor, norm: RMSNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """[..., hidden] × 2 → h' and norm(h') if there is a norm, [..., hidden] each."""
        if norm is None:
            return weighted_residual(h, update, self.scale()), None
        normed: tuple[Tensor, Tensor] = norm(h, update, self.scale())
        return normed


class SwiGLU(nn.Module):
    """Gated feed-forward, columns split over the tensor-parallel group."""

    def __init__(self, hidden: int, intermediate: int, config: ModelParallelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = column_linear(hidden, intermediate, config)
        self.up_proj = column_linear(hidden, intermediate, config)
        self.down_proj = row_linear(intermediate, hidden, config)

    def forward(self, h: Tensor) -> Tensor:
        """[T or T/tp, 1, hidden] → the same."""
        gate, up = project(h, (self.gate_proj, self.up_proj), self.config)
        return self.down_proj(swiglu(gate, up))[0]
