"""What a step looks like from inside, by kind of layer: norms, update ratios, activations, decay.

Sums of squares over every parameter once, whatever the layout; reduced over all ranks in one call,
only at the steps that are looked at.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from parallel.groups import replicas_group
from parallel.mixers import SSDMixer
from parallel.model import DecoderLayer
from parallel.params import EMBEDDING, HEAD, ParamInfo
from parallel.zero import ZeroOptimizer

KINDS = ("attention", "ssd", "feed_forward", "norm", "embedding")
LONG_MEMORY = 0.99  # a decay above this keeps a third of a state for a hundred tokens


def kind_of(name: str) -> str:
    """Of a parameter, by its global name."""
    if name in (EMBEDDING, HEAD):
        return "embedding"
    for part, kind in (
        (".attn.", "attention"),
        (".ssd.", "ssd"),
        (".feed_forward.", "feed_forward"),
    ):
        if part in name:
            return kind
    return "norm"


class Vitals:
    """Of one step: `watching` around its passes, `gradients` before its update, `collect` after."""

    def __init__(self, zero: ZeroOptimizer) -> None:
        self._zero = zero
        self._sums: dict[str, Tensor | float] = defaultdict(float)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record activations and decays, and restore the modules afterwards.

        Layers run eagerly meanwhile: with hooks, compiled layers would be compiled again.
        """
        handles: list[Any] = []
        mixers: list[SSDMixer] = []
        for chunk in self._zero.built.chunks:
            for layer in chunk.modules():
                if isinstance(layer, DecoderLayer):
                    handles += self._hooks(layer)
                elif isinstance(layer, SSDMixer):
                    layer.observe = self._scan
                    mixers.append(layer)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for mixer in mixers:
                mixer.observe = None

    def _hooks(self, layer: DecoderLayer) -> Iterator[Any]:
        parts = {"attention": layer.attn, "ssd": layer.ssd, "feed_forward": layer.feed_forward}
        for kind, module in parts.items():
            if module is not None:
                yield module.register_forward_hook(partial(self._activation, kind))

    def _activation(self, kind: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._sums[f"activation {kind}"] += output.detach().float().square().mean().double()
        self._sums[f"activations {kind}"] += 1.0

    @torch.no_grad()
    def _scan(self, dt: Tensor, dt_bias: Tensor, A: Tensor) -> None:
        """dt [B, L, heads] before softplus."""
        delta = F.softplus(dt.float() + dt_bias.float())
        decay = torch.exp(delta * A)
        self._sums["delta"] += delta.mean().double()
        self._sums["decay"] += decay.mean().double()
        self._sums["long"] += (decay > LONG_MEMORY).double().mean()
        self._sums["scans"] += 1.0

    def gradients(self) -> None:
        """Look at the gradients of the whole batch, before clipping. A collective."""
        for name, gradient in self._zero.gradients():
            share = self._share(self._zero.infos[name], whole=True)
            self._sums[f"grad {kind_of(name)}"] += share * gradient.double().square().sum()

    def _share(self, info: ParamInfo, *, whole: bool) -> float:
        """1 / how many ranks look at the same values; whole: on every replica."""
        if info.duplicate:
            return 0.0
        replicas = replicas_group().size() if whole or self._zero.zero_stage == 0 else 1
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        return 1 / (replicas * (1 if info.tensor_parallel else tensor))

    @torch.no_grad()
    def _weights(self, lr: float) -> None:
        """Weights, and the update that AdamW has just made of them, from its moments."""
        groups = self._zero.adam.param_groups
        (beta1, beta2), eps = groups[0]["betas"], groups[0]["eps"]
        weight_decay = max(group["weight_decay"] for group in groups)
        step = self._zero.adam_step()
        for fragment in self._zero.fragments():
            info = fragment.info
            decay = weight_decay if info.decays else 0.0
            mean = fragment.exp_avg / (1 - beta1**step)
            scale = (fragment.exp_avg_sq / (1 - beta2**step)).sqrt() + eps
            moved = lr * mean / scale
            before = (fragment.weight + moved) / (1 - lr * decay)
            share = self._share(info, whole=False)
            kind = kind_of(info.name)
            self._sums[f"weight {kind}"] += share * fragment.weight.double().square().sum()
            update = fragment.weight - before
            self._sums[f"update {kind}"] += share * update.double().square().sum()

    def collect(self, lr: float, updated: bool) -> dict[str, float]:
        """All of it, by name, the same on every rank; forgets it. A collective."""
        if updated:
            self._weights(lr)
        names = [f"{what} {kind}" for what in ("grad", "weight", "update") for kind in KINDS]
        names += [f"{what} {kind}" for what in ("activation", "activations") for kind in KINDS[:3]]
        names += ["delta", "decay", "long", "scans"]
        device = next(self._zero.built.chunks[0].parameters()).device
        values = [torch.as_tensor(self._sums[n], dtype=torch.float64).to(device) for n in names]
        sums = torch.stack(values)
        dist.all_reduce(sums)
        self._sums.clear()
        of = dict(zip(names, sums.tolist(), strict=True))
        found = {}
        for kind in KINDS:
            if of[f"grad {kind}"]:
                found[f"grad_norm_{kind}"] = of[f"grad {kind}"] ** 0.5
            if of[f"weight {kind}"]:
                found[f"weight_norm_{kind}"] = of[f"weight {kind}"] ** 0.5
                found[f"update_ratio_{kind}"] = (of[f"update {kind}"] / of[f"weight {kind}"]) ** 0.5
        for kind in KINDS[:3]:
            if count := of[f"activations {kind}"]:
                found[f"activation_rms_{kind}"] = (of[f"activation {kind}"] / count) ** 0.5
        if of["scans"]:
            for name, key in (("ssd_delta", "delta"), ("ssd_decay", "decay"),
                              ("ssd_long_memory", "long")):  # fmt: skip
                found[name] = of[key] / of["scans"]
        return found
