"""A stage that is evaluated and not trained: neither optimizer nor ZeRO."""

from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.build import BuiltStage
from parallel.zero import Fragment


class FrozenStage:
    """Takes weights from a checkpoint as `ZeroOptimizer` does: filled fragments, then refreshed."""

    def __init__(self, built: BuiltStage) -> None:
        self.built, self.infos = built, built.infos
        for _, parameter in built.named_parameters():
            parameter.requires_grad_(False)
        self._masters: dict[str, Tensor] | None = {
            name: torch.empty(parameter.numel(), dtype=torch.float32)
            for name, parameter in built.named_parameters()
        }

    def fragments(self) -> Iterator[Fragment]:
        """All of this rank's parameters, on the host, without moments."""
        assert self._masters is not None, "weights are loaded once"
        for name, master in self._masters.items():
            none = master[:0]
            yield Fragment(self.infos[name], 0, master.numel(), master, none, none)

    def refresh_parameters(self) -> None:
        """Set the parameters, and drop what was filled."""
        assert self._masters is not None, "weights are loaded once"
        for name, parameter in self.built.named_parameters():
            parameter.copy_(self._masters[name].view_as(parameter))
        self._masters = None
