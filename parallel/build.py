"""From configuration to a stage that trains: build → initialise → ZeRO, in this order."""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from parallel.compat import without_retired
from parallel.config import ModelConfig, ParallelConfig
from parallel.init import initialize
from parallel.model import PipelineStage
from parallel.params import ParamInfo, describe_parameters
from parallel.split import stage_layers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class BuiltStage:
    """This rank's part of the model and what its parameters are globally."""

    stage: PipelineStage
    infos: dict[str, ParamInfo]


def megatron_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, deterministic: bool
) -> TransformerConfig:
    """Megatron-core's view of the layout."""
    return TransformerConfig(
        **without_retired(
            TransformerConfig,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_heads,
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            sequence_parallel=parallel.sequence_parallel,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            async_tensor_model_parallel_allreduce=False,
            batch_p2p_sync=False,
            calculate_per_token_loss=True,  # the schedule must not scale the loss: we do
            deallocate_pipeline_outputs=True,
            deterministic_mode=deterministic,
        )
    )


def build_stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    seq_len: int,
    dtype: torch.dtype,
    seed: int,
    deterministic: bool,
    device: torch.device,
) -> BuiltStage:
    """This rank's pipeline stage with its initial weights, on `device`. Groups must exist."""
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    layers = stage_layers(model, parallel, seq_len)[pipeline_rank]
    stage = PipelineStage(
        model,
        megatron_config(model, parallel, dtype, deterministic),
        layers,
        first=pipeline_rank == 0,
        last=pipeline_rank == parallel.pipeline - 1,
        recompute=parallel.recompute,
        seq_len=seq_len,
        device=device,
    )
    infos = describe_parameters(
        stage, model, parallel_state.get_tensor_model_parallel_rank(), parallel.tensor
    )
    initialize(stage, infos, model, seed)
    return BuiltStage(stage, infos)
