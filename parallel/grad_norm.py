"""The norm of all gradients, before clipping, in a handful of operations and one sum over ranks.

    norm = √ Σ g²,  every parameter of the model counted once

What tensor-parallel ranks hold whole is counted on the first of them, a tied embedding on the first
stage. DeepSpeed's own norms issue an operation or two a parameter, and its offloaded optimizers
wait for the device once a parameter.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from megatron.core import parallel_state
from torch import Tensor

from parallel.params import ParamInfo


def counts_here(info: ParamInfo) -> bool:
    """Whether this tensor-parallel rank and stage are to count a parameter they hold."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    return not info.duplicate and (info.tensor_parallel or first)


class GradNorm:
    """The norm over the gradient parts that the optimizers of all ranks own.

    counts: whether this rank counts a parameter; shards: the ranks that ZeRO shards over.
    """

    def __init__(
        self, optimizer: Any, counts: Callable[[Any], bool], shards: dist.ProcessGroup
    ) -> None:
        self._optimizer, self._counts, self._shards = optimizer, counts, shards
        self._owned: list[Tensor] = []
        if isinstance(optimizer, BF16_Optimizer):  # whose buffers stay where they are
            self._owned = list(_parts_of_buffers(optimizer, counts))

    @torch.no_grad()
    def __call__(self, device: torch.device) -> Tensor:
        """A float32 scalar on `device`, the same on every rank, between the gradients' reduction
        and the update. Collective."""
        norms = self._norms()
        total = torch.zeros((), device=device)
        if norms:
            total = torch.stack(norms).to(device).square().sum()
        for group in (self._shards, parallel_state.get_model_parallel_group()):
            if group.size() > 1:
                dist.all_reduce(total, group=group)
        return total.sqrt()

    def _norms(self) -> list[Tensor]:
        """Of each owned part that counts, float32 scalars."""
        optimizer = self._optimizer
        if isinstance(optimizer, BF16_Optimizer):
            return _each(self._owned)
        if getattr(optimizer, "cpu_offload", False) or getattr(
            optimizer, "offload_optimizer", False
        ):
            # taken while the gradients were still on the device
            of_parameter = optimizer.norm_for_param_grads
            held = (p for group in _groups(optimizer) for p in group if self._counts(p))
            found = [of_parameter.get(optimizer.get_param_id(p)) for p in held]
            return [
                torch.as_tensor(norm, dtype=torch.float32) for norm in found if norm is not None
            ]
        parts = []
        for index, group in enumerate(_groups(optimizer)):
            gradients = optimizer.averaged_gradients[index]
            real = (g for g in gradients if not getattr(g, "_zero_padding", False))
            parts += [g.float() for g, p in zip(real, group, strict=False) if self._counts(p)]
        return _each(parts)


def _each(parts: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(parts)) if parts else []


def _groups(optimizer: Any) -> list[list[Any]]:
    """The parameters that a rank owns parts of, as its lists of gradients have them."""
    groups: list[list[Any]] = (
        optimizer.fp16_groups
        if hasattr(optimizer, "fp16_groups")
        else [optimizer.params_in_partition[i] for i in range(len(optimizer.bit16_groups))]
    )
    return groups


def _parts_of_buffers(optimizer: Any, counts: Callable[[Any], bool]) -> list[Tensor]:
    """The owned parts of BF16_Optimizer's gradients that count."""
    parts = []
    for index, group in enumerate(optimizer.bf16_groups):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None and counts(parameter):
                address = mapping.hp_fragment_address
                gradients = optimizer.fp32_groups_gradient_flat_partition[index]
                parts.append(gradients.narrow(0, address.start, address.numel))
    return parts
