"""Float32 sums of bf16 gradients over micro-batches, in the buffers of DeepSpeed's BF16_Optimizer.

    main_grad += ∂loss/∂w          once a micro-batch, for every parameter that it uses

DeepSpeed's hooks take a gradient from autograd in bf16, cast it and add it: two operations a
parameter. Here the gradient of a linear layer's weight is summed inside the product that computes
it (`parallel.projections`), and that of the head while it is scaled (`parallel.loss`); autograd
never sees them. What does arrive through autograd is added without a cast of its own: a matrix (the
embedding) at once, and all vectors together when the backward pass ends. DeepSpeed's flags are set
as its hooks set them, whenever a gradient is added.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor


class MainGrads:
    """Replaces the gradient hooks of a BF16_Optimizer with `immediate_grad_update`.

    Sets `main_grad` of every parameter (Megatron-core's name): float32 in the parameter's shape, a
    view of the optimizer's buffer, at the offset that the weight has in its own buffer.
    """

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self._optimizer = optimizer
        self._waiting: list[tuple[Any, Tensor]] = []
        self._noted: list[Any] | None = None
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks = []
        for group, parameters in enumerate(optimizer.bf16_groups):
            for index, parameter in enumerate(parameters):
                total = optimizer.fp32_groups_gradients[group][index].view(parameter.shape)
                # weights that are adjacent have sums that are adjacent
                assert total.storage_offset() == parameter.storage_offset()
                parameter.main_grad, parameter.main_grad_owner = total, self
                parameter.main_grad_index = group, index
                hook = parameter.register_post_accumulate_grad_hook(self._accumulated)
                optimizer._grad_acc_hooks.append(hook)

    def mark(self, parameter: Any) -> None:
        """Set DeepSpeed's flags: a gradient has been added to the parameter's sum."""
        if self._noted is not None:
            self._noted.append(parameter)
            return
        group, index = parameter.main_grad_index
        parameter._hp_grad = self._optimizer.fp32_groups_gradients[group][index]
        self._optimizer.fp32_groups_has_gradients[group][index] = True

    @contextmanager
    def noting(self, noted: list[Any]) -> Iterator[None]:
        """Collect the parameters that a recorded backward pass marks, without setting flags."""
        self._noted = noted
        try:
            yield
        finally:
            self._noted = None
            self._waiting.clear()  # not empty after a failure

    @torch.no_grad()
    def _accumulated(self, parameter: Any) -> None:
        """Take over the gradient that autograd has accumulated."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:  # autograd also calls where it has got none
            return
        if gradient.ndim == 2:
            parameter.main_grad.add_(gradient)
            self.mark(parameter)
            return
        if not self._waiting:
            # called once, when the backward pass that runs now has ended
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self.add_waiting())
        self._waiting.append((parameter, gradient))

    @torch.no_grad()
    def add_waiting(self) -> None:
        """Add the gradients of vectors that came in a backward pass."""
        waiting, self._waiting = self._waiting, []
        totals = [parameter.main_grad for parameter, _ in waiting]
        # an addition of two dtypes would be one launch a tensor; a copy is a few for all
        exact = [torch.empty_like(total) for total in totals]
        torch._foreach_copy_(exact, [gradient for _, gradient in waiting])
        torch._foreach_add_(totals, exact)
        for parameter, _ in waiting:
            self.mark(parameter)


def main_grad(weight: Tensor) -> Tensor | None:
    """Return the float32 sum [weight's shape] that its gradients are added to, or None."""
    return getattr(weight, "main_grad", None)


def mark(weight: Any) -> None:
    """Say that a gradient has been added to `main_grad(weight)`, which is not None."""
    weight.main_grad_owner.mark(weight)
