"""From configuration to a stage that trains: build → initialise → ZeRO, in this order."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import nn

from parallel.compat import without_retired
from parallel.config import ModelConfig, ParallelConfig
from parallel.groups import virtual_pipeline_size
from parallel.init import initialize
from parallel.model import PipelineStage
from parallel.params import ParamInfo, describe_parameters
from parallel.split import layer_chunks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class BuiltStage:
    """This rank's chunks of the model, first to last, and what its parameters are globally."""

    chunks: list[PipelineStage]
    infos: dict[str, ParamInfo]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """By global name; no two chunks hold the same one."""
        for chunk in self.chunks:
            yield from chunk.named_parameters()


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
            virtual_pipeline_model_parallel_size=virtual_pipeline_size(parallel),
            context_parallel_size=parallel.context,
            sequence_parallel=parallel.sequence_parallel,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            async_tensor_model_parallel_allreduce=False,
            # interleaved stages send both ways at once; two stages would mix up a batch of sends
            overlap_p2p_comm=parallel.virtual_pipeline > 1,
            batch_p2p_comm=parallel.virtual_pipeline == 1,
            batch_p2p_sync=False,
            calculate_per_token_loss=True,  # the schedule must not scale the loss: we do
            # interleaved, an output would be freed while its send is still under way
            deallocate_pipeline_outputs=parallel.virtual_pipeline == 1,
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
    z_loss: float = 0.0,
) -> BuiltStage:
    """This rank's pipeline stage with its initial weights, on `device`. Groups must exist.

    z_loss: coefficient of the squared log-normaliser in the gradient of the loss.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    megatron = megatron_config(model, parallel, dtype, deterministic)
    layers = layer_chunks(model, parallel, seq_len)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    chunks: list[PipelineStage] = []
    infos: dict[str, ParamInfo] = {}
    for index in range(stage, parallel.num_chunks, parallel.pipeline):
        chunk = PipelineStage(
            model,
            megatron,
            layers[index],
            first=index == 0,
            last=index == parallel.num_chunks - 1,
            recompute=parallel.recompute_of,
            seq_len=seq_len,
            device=device,
            z_loss=z_loss,
        )
        described = describe_parameters(chunk, model, tensor_rank, parallel.tensor)
        initialize(chunk, described, model, seed)
        chunks.append(chunk)
        infos |= described
    return BuiltStage(chunks, infos)
