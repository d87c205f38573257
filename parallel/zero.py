"""DeepSpeed ZeRO under Megatron-core's groups and schedules.

Megatron's schedule drives the micro-batches, so DeepSpeed sees one accumulation step. Two ways:

- stage 1 (the only one with pipeline stages): the schedule runs the bare module; gradients
  accumulate in float32 (in the parameters' gradients, or in BF16_Optimizer's buffers, which
  `parallel.main_grads` fills during backward) and are reduced once, after the schedule.
  BF16_Optimizer's gradients are reduced to the rank that owns them. Stage 0 shards nothing:
  DeepSpeed gets a group of one rank, and gradients are averaged here.
- stages 2 and 3, and every stage with an offloaded optimizer: the schedule runs the engine, whose
  hooks reduce and partition every micro-batch's gradients during backward; only the last one is an
  accumulation boundary.

The gradient norm is computed here, for all optimizers alike, and read by the host once a step, with
the losses: its one wait. Clipping is a factor that Adam's kernel applies as it reads the gradients.

This is the one file that knows DeepSpeed's inner layout of master weights and optimizer state.
"""

import io
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from parallel.build import BuiltStage
from parallel.config import ParallelConfig
from parallel.grad_norm import GradNorm, counts_here
from parallel.groups import MpuAdapter, group_of_this_rank, replicas_group
from parallel.main_grads import MainGrads
from parallel.model import PipelineStage
from parallel.params import EMBEDDING, ParamInfo
from parallel.sizes import BUCKET_ELEMENTS, GATHERED_ELEMENTS
from parallel.update_guard import UpdateGuard

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it reports memory at every start


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter whose optimizer state this rank owns.

    Elements [start, start + numel) of the flattened local tensor; `weight` (float32 master),
    `exp_avg` and `exp_avg_sq` are flat views of the live state.
    """

    info: ParamInfo
    start: int
    numel: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class Update:
    """What a step came to."""

    grad_norm: float
    """Before clipping; nan if it is not finite."""
    applied: bool


class ZeroOptimizer:
    """A stage under DeepSpeed: the module to schedule, the step, and access to sharded state."""

    def __init__(
        self,
        built: BuiltStage,
        parallel: ParallelConfig,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_grad_norm: float,
    ) -> None:
        self.built, self.infos = built, built.infos
        self.zero_stage = parallel.zero_stage
        self.offload = parallel.offload == "optimizer"
        self.reduces_in_backward = parallel.reduces_in_backward
        parameters = dict(built.named_parameters())
        decays = [p for name, p in parameters.items() if self.infos[name].decays]
        rest = [p for name, p in parameters.items() if not self.infos[name].decays]
        groups = [
            {"params": decays, "weight_decay": weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True
        )
        self.tied_weight = parameters.get(EMBEDDING) if self._embedding_is_shared() else None
        first = built.chunks[0]
        config = self._deepspeed_config(first.config.params_dtype)
        shards = replicas_group() if self.zero_stage else group_of_this_rank()
        with redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory tables
            self.engine = deepspeed.initialize(
                model=first if len(built.chunks) == 1 else nn.ModuleList(built.chunks),
                optimizer=adam,
                mpu=MpuAdapter(shards),
                config=config,
                dist_init_required=False,
            )[0]
        self.optimizer: Any = self.engine.optimizer
        self.adam = adam
        self._guard = UpdateGuard(adam, self.optimizer)
        self.main_grads = (
            MainGrads(self.optimizer) if isinstance(self.optimizer, BF16_Optimizer) else None
        )
        self.clip_grad_norm = clip_grad_norm
        counted = {id(p) for name, p in parameters.items() if counts_here(self.infos[name])}
        self._grad_norm = GradNorm(self.optimizer, lambda p: id(p) in counted, shards)
        # Skip two passes over all gradients: the norm reports overflow, and Adam clips.
        self.optimizer.check_overflow = lambda *_, **__: None
        self.optimizer.unscale_and_clip_grads = lambda *_, **__: None
        if self.zero_stage == 3:
            _register_weights_used_by_parents(first)
        self._create_adam_state()

    def _deepspeed_config(self, dtype: torch.dtype) -> dict[str, Any]:
        numel = sum(p.numel() for _, p in self.built.named_parameters())
        bucket = min(BUCKET_ELEMENTS, numel + numel % 2)  # DeepSpeed wants a multiple of two
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # see _clip
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": max(1, self.zero_stage),
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                # with either of these ZeRO-1 would reduce in backward hooks, which know nothing of
                # several micro-batches in flight
                "contiguous_gradients": self.reduces_in_backward,
                "overlap_comm": self.reduces_in_backward and torch.cuda.is_available(),
            },
        }
        if self.offload:
            pinned = torch.cuda.is_available()
            offload = {"device": "cpu", "pin_memory": pinned}
            config["zero_optimization"]["offload_optimizer"] = offload
            config["zero_force_ds_cpu_optimizer"] = False  # its own Adam is compiled at start
        if self.zero_stage == 3:
            # every parameter is partitioned, also small ones: one rule for owning its state
            config["zero_optimization"] |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": GATHERED_ELEMENTS,
                "stage3_max_reuse_distance": GATHERED_ELEMENTS,
            }
        if dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True, "immediate_grad_update": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["communication_data_type"] = "fp32"
        return config

    def _embedding_is_shared(self) -> bool:
        """Whether first and last stage each hold a copy of the tied embedding."""
        return (
            self.built.chunks[0].model_config.tie_word_embeddings
            and parallel_state.get_pipeline_model_parallel_world_size() > 1
        )

    # -- training -----------------------------------------------------------------------------

    @property
    def scheduled_modules(self) -> list[Any]:
        """What Megatron's schedule runs: the chunks, first to last."""
        if not self.reduces_in_backward:
            return list(self.built.chunks)
        return [_ScheduledEngine(self.engine, chunk) for chunk in self.built.chunks]

    def set_no_sync(self, wanted: bool) -> None:
        """Whether the schedule is to hold back gradient sums until the last micro-batch."""
        self.built.chunks[0].config.no_sync_func = self.no_sync if wanted else None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around all micro-batches but the last: gradients accumulate (Megatron's no_sync_func)."""
        self.engine.set_gradient_accumulation_boundary(False)
        yield
        self.engine.set_gradient_accumulation_boundary(True)

    def reduce_gradients(self) -> None:
        """After the schedule: finish the gradient sums over stages and data-parallel ranks."""
        if self.tied_weight is not None:
            torch.distributed.all_reduce(
                self._accumulated_gradient(self.tied_weight),
                group=parallel_state.get_embedding_group(),
            )
        self.engine.set_gradient_accumulation_boundary(True)
        if self.zero_stage == 0:
            self._average_gradients()
        if isinstance(self.optimizer, BF16_Optimizer):
            self._scatter_gradients()
        elif not self.reduces_in_backward:
            self.engine.allreduce_gradients(bucket_size=BUCKET_ELEMENTS)

    def _average_gradients(self) -> None:
        """Over the ranks that hold the same parameters, each of which makes the whole update."""
        group = replicas_group()
        if group.size() == 1:
            return
        if isinstance(self.optimizer, BF16_Optimizer):
            gradients = self.optimizer.fp32_groups_gradients_flat
        else:
            gradients = [self._accumulated_gradient(p) for _, p in self.built.named_parameters()]
        sums = [torch.distributed.all_reduce(g, group=group, async_op=True) for g in gradients]
        for work in sums:
            work.wait()
        torch._foreach_div_(gradients, group.size())

    def _scatter_gradients(self) -> None:
        """Average over the ranks that hold the same parameters, each rank its own part of them."""
        group = replicas_group()
        if self.zero_stage == 0 or group.size() == 1:
            return
        for whole, own in self._flat_gradients():
            torch.distributed.reduce_scatter_tensor(own, whole, group=group)
            own.div_(group.size())

    def _flat_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """BF16_Optimizer's buffers, and in each the part that this rank updates."""
        own = self.optimizer.fp32_groups_gradient_flat_partition
        yield from zip(self.optimizer.fp32_groups_gradients_flat, own, strict=True)

    def grad_norm(self) -> Tensor:
        """Norm of all gradients before clipping, between reduce_gradients and step: a float32
        scalar on the device, the same on every rank. Collective."""
        return self._grad_norm(next(self.built.chunks[0].parameters()).device)

    def step(self, lr: float, norm: float | None = None, *, refused: bool = False) -> Update:
        """Clip by the global norm, update, zero gradients.

        norm: what grad_norm() came to, where the host has read it; refused: leave the state as it
        is, which is done where the norm is not finite anyway. Both are the same on every rank.
        """
        for group in self.adam.param_groups:
            group["lr"] = lr
        norm = float(self.grad_norm()) if norm is None else norm
        finite = math.isfinite(norm)
        refused = refused or not finite
        self._clip(norm)
        self._guard.open(refused)
        # Not the way of its own that DeepSpeed has for a norm that is not finite: with an offloaded
        # optimizer that keeps the bad gradients, and adds those of the next step to them
        with self._norm_is_known(norm if finite else 0.0):
            self.engine.step()
        return Update(norm if finite else math.nan, applied=self._guard.close())

    @contextmanager
    def _norm_is_known(self, norm: float) -> Iterator[None]:
        """Spare DeepSpeed's optimizers, of which each has its own way, to compute it again."""
        if not isinstance(self.optimizer, BF16_Optimizer):
            if self.zero_stage == 3:
                self.optimizer._get_norm_groups = lambda: [norm]
            else:
                self.optimizer.scaled_global_norm = lambda: norm
            yield
            return
        self.optimizer.get_grads_for_norm = lambda: ([], {})
        module: Any = sys.modules[type(self.optimizer).__module__]  # of all such optimizers
        computed = module.get_global_norm_of_tensors
        module.get_global_norm_of_tensors = lambda **_: norm
        try:
            yield
        finally:
            module.get_global_norm_of_tensors = computed

    def _clip(self, norm: float) -> None:
        """Have Adam divide the gradients, as it reads them, where their norm is too large."""
        scale = (norm + 1e-6) / self.clip_grad_norm if self.clip_grad_norm else 1.0
        device = self._flat_masters()[0].device
        # not a copy from the host, which would wait
        self.adam.grad_scale = torch.full((), scale, device=device) if scale > 1 else None  # type: ignore[attr-defined]

    def full_gradients(self) -> dict[str, Tensor]:
        """Reduced float32 gradients of this rank's parameters [local shape], between
        reduce_gradients and step. A collective over the data-parallel group; for comparisons."""
        return {name: gradient.clone() for name, gradient in self.gradients()}

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one after the other."""
        bf16 = isinstance(self.optimizer, BF16_Optimizer)
        if bf16 and self.zero_stage and (group := replicas_group()).size() > 1:
            for whole, own in self._flat_gradients():
                torch.distributed.all_gather_into_tensor(whole, own.clone(), group=group)
        for name, parameter in self.built.named_parameters():
            gradient = (
                self._accumulated_gradient(parameter) if bf16 else safe_get_full_grad(parameter)
            )
            yield name, gradient.detach().float().reshape(self.infos[name].local_shape)

    def full_parameters(self) -> dict[str, Tensor]:
        """Float32 masters of this rank's parameters [local shape]. A collective over the
        data-parallel group; for comparisons."""
        return {
            name: safe_get_full_fp32_param(p).detach().reshape(self.infos[name].local_shape).clone()
            for name, p in self.built.named_parameters()
        }

    def _accumulated_gradient(self, parameter: Tensor) -> Tensor:
        """The stage-1 accumulation buffer of a parameter."""
        if isinstance(self.optimizer, BF16_Optimizer):
            return parameter.main_grad  # type: ignore[attr-defined]
        assert parameter.grad is not None
        return parameter.grad

    # -- state --------------------------------------------------------------------------------

    def _create_adam_state(self) -> None:
        """Zero moments now rather than at the first step, so that they can be saved and loaded."""
        for master in self._flat_masters():
            if "exp_avg" not in self.adam.state[master]:
                on_gpu = master.device if master.is_cuda else None
                self.adam.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32, device=on_gpu),
                    "exp_avg": torch.zeros_like(master, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
                }

    def adam_step(self) -> int:
        """Updates made so far, as Adam's bias correction counts them."""
        state = next(iter(self.adam.state.values()))
        return int(state["step"])

    def set_adam_step(self, step: int) -> None:
        """Set the number of updates made so far."""
        for state in self.adam.state.values():
            state["step"].fill_(step)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments; over all ranks with the same parameters they cover every one once
        (at ZeRO 0: on each of these ranks)."""
        for name, parameter in self.built.named_parameters():
            located = self._locate(parameter)
            if located is None:
                continue
            master, offset, start, numel = located
            state = self.adam.state[master]
            yield Fragment(
                self.infos[name],
                start,
                numel,
                master.detach().narrow(0, offset, numel),
                state["exp_avg"].narrow(0, offset, numel),
                state["exp_avg_sq"].narrow(0, offset, numel),
            )

    def _locate(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """(flat master, offset in it, start in the flattened parameter, numel) of what is owned."""
        if self.zero_stage == 3:
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            share = parameter.ds_tensor.ds_numel
            start = share * replicas_group().rank()
            numel = min(share, parameter.ds_numel - start)
            if numel <= 0:
                return None
            return self._flat_masters()[group], int(offset), start, numel
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        master = self._flat_masters()[mapping.param_group_index]
        address, local = mapping.hp_fragment_address, mapping.lp_fragment_address
        return master, address.start, local.start, address.numel

    def _flat_masters(self) -> list[Tensor]:
        if self.zero_stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.adam.param_groups]

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Set the module's parameters from the master weights (after loading those)."""
        parameter: Any  # ZeRO-3 adds attributes
        for _, parameter in self.built.named_parameters():
            if self.zero_stage == 3:
                located = self._locate(parameter)
                if located is not None:
                    master, offset, _, numel = located
                    parameter.ds_tensor.data[:numel].copy_(master.narrow(0, offset, numel))
            else:
                parameter.copy_(safe_get_full_fp32_param(parameter).view_as(parameter))


def _register_weights_used_by_parents(stage: PipelineStage) -> None:
    """Tell ZeRO 3 which modules read weights of others: it gathers a weight for its own alone."""
    if stage.tied_head:
        deepspeed.zero.register_external_parameter(stage, stage.model.word_embed.weight)
    for module in stage.modules():
        for child in module.children():
            if isinstance(child, ColumnParallelLinear):
                deepspeed.zero.register_external_parameter(module, child.weight)


class _ScheduledEngine:
    """The engine with the attributes Megatron's schedules look for (its own `config` differs)."""

    def __init__(self, engine: Any, stage: Any) -> None:
        self.engine, self.config, self.model_type = engine, stage.config, stage.model_type
        self.set_input_tensor = stage.set_input_tensor

    def __call__(self, *args: Tensor) -> Any:
        return self.engine(*args)
