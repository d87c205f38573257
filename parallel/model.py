"""TransXSSM as a Megatron-core pipeline stage (paper, section 3).

    h ← r₁ ⊙ h + Mixer(RMSNorm(h));   h ← r₂ ⊙ h + SwiGLU(RMSNorm(h))

A stage holds some of the layers under their global numbers; the first also embeds, the last
normalises and predicts. Parameter names are those of the single-GPU model.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast

import torch
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn

from kernels.dispatch import runs_triton
from kernels.rope.table import rotary_cos_sin
from kernels.ssd.tables import scan_tables
from parallel.config import ModelConfig
from parallel.layers import (
    RMSNorm,
    SwiGLU,
    WeightedResidual,
    enter_tensor_parallel,
    mark_split,
    recomputed,
)
from parallel.loss import head_logits, head_loss, head_scores
from parallel.mixers import AttentionMixer, Positions, SSDMixer, document_ages
from parallel.params import EMBEDDING

Recompute = Callable[[int], Literal["none", "selective", "full"]]


class DecoderLayer(nn.Module):
    """One decoder layer: a mixer and a feed-forward, each behind a norm and a weighted residual."""

    def __init__(
        self,
        layer: int,
        model: ModelConfig,
        config: ModelParallelConfig,
        device: torch.device,
        recompute_mixer: bool,
    ) -> None:
        super().__init__()
        norm = partial(RMSNorm, model.hidden_size, model.rms_norm_eps, config, device)
        self.pre_sequence_layernorm = norm()
        attends = model.is_attention(layer)
        self.attn = AttentionMixer(model, config, recompute_mixer) if attends else None
        self.ssd = None if attends else SSDMixer(model, config, device, recompute_mixer)
        self.post_sequence_residual = WeightedResidual(model.hidden_size, config, device)
        self.pre_state_layernorm = norm()
        self.feed_forward = SwiGLU(model.hidden_size, model.intermediate_size, config)
        self.post_state_residual = WeightedResidual(model.hidden_size, config, device)

    def forward(
        self, h: Tensor, normed: Tensor | None, positions: Positions, next_norm: RMSNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """h [T or T/tp, 1, hidden] → the same, and next_norm of it if there is one.

        normed: pre_sequence_layernorm of h, where it was computed together with h. So a layer
        computes the norm of the next one: in the pass of its own last residual.
        """
        if normed is None:
            h, normed = self.pre_sequence_layernorm(h)
        mixer = self.ssd if self.attn is None else self.attn
        assert mixer is not None
        mixed = mixer(normed, positions)
        h, u = self.post_sequence_residual(h, mixed, self.pre_state_layernorm)
        after: tuple[Tensor, Tensor | None] = self.post_state_residual(
            h, self.feed_forward(u), next_norm
        )
        return after


class Decoder(nn.Module):
    """The part below `model.` in the parameter names: what this stage holds of it."""

    def __init__(
        self,
        model: ModelConfig,
        config: ModelParallelConfig,
        device: torch.device,
        layers: Sequence[int],
        *,
        embeds: bool,
        last: bool,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        if embeds:
            self.word_embed = vocab_embedding(model, config)
        self.layers = nn.ModuleDict(
            {
                str(i): DecoderLayer(i, model, config, device, recompute(n) == "selective")
                for n, i in enumerate(layers)
            }
        )
        if last:
            self.final_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps, config, device)


def vocab_embedding(model: ModelConfig, config: ModelParallelConfig) -> VocabParallelEmbedding:
    """Rows split over the tensor-parallel group; reads ids [1, T], gives [T or T/tp, 1, hidden]."""
    embedding = VocabParallelEmbedding(
        model.padded_vocab_size,
        model.hidden_size,
        init_method=lambda weight: None,
        reduce_scatter_embeddings=config.sequence_parallel,
        config=config,
    )
    mark_split(embedding.weight, 0)
    return embedding


class PipelineStage(nn.Module):
    """Consecutive layers of one stage, with what Megatron-core's schedules ask of a module.

    `recompute` says of the n-th of them what it recomputes.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        model: ModelConfig,
        config: ModelParallelConfig,
        layers: Sequence[int],
        *,
        first: bool,
        last: bool,
        recompute: Recompute,
        seq_len: int,
        device: torch.device,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.model_config, self.z_loss = config, model, z_loss
        self.first, self.last = first, last
        self.has_scans = not all(model.is_attention(layer) for layer in layers)
        self.recomputes = [recompute(n) == "full" for n in range(len(layers))]
        self.tied_head = last and model.tie_word_embeddings
        embeds = first or self.tied_head
        self.model = Decoder(
            model,
            config,
            device,
            layers,
            embeds=embeds,
            last=last,
            recompute=recompute,
        )
        if last and not model.tie_word_embeddings:
            self.lm_head = vocab_embedding(model, config)  # same shape and split as the embedding
        self.duplicate_parameters = (
            frozenset({EMBEDDING}) if self.tied_head and not first else frozenset()
        )
        self.to(device)
        # Tables over all positions, built once; gathered by position for every micro-batch
        self._tables = {
            dim: rotary_cos_sin(
                torch.arange(seq_len, device=device), dim, model.rope_theta, model.rope_scaling
            )
            for dim in {model.head_dim, model.state_dim}
        }
        self._input: Tensor | None = None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Called by the schedule: hidden states from the previous stage."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def positions(
        self, position_ids: Tensor, cu_seqlens: Tensor, local_cu_seqlens: Tensor | None
    ) -> Positions:
        """What all layers read of this micro-batch, made once. position_ids [B, L]."""
        model = self.model_config
        attention = ssd = None
        if model.rope != "none":
            cos, sin = self._tables[model.head_dim]
            attention = (cos[position_ids], sin[position_ids])  # [B, L, head_dim / 2]
        if model.rope == "unified":
            cos, sin = self._tables[model.state_dim]
            same = model.state_dim == model.head_dim
            ssd = attention if same else (cos[position_ids], sin[position_ids])
        batch_size, seq_len = position_ids.shape
        local = cu_seqlens if local_cu_seqlens is None else local_cu_seqlens
        tables = None
        if self.has_scans and runs_triton(position_ids.device):
            dtype = next(self.model.layers.parameters()).dtype
            tables = scan_tables(local, ssd, position_ids.numel(), dtype)
        ages = None
        if self.has_scans and model.ssd_conv_width:
            ages = document_ages(cu_seqlens, position_ids.numel())
        return Positions(
            batch_size, seq_len, cu_seqlens, local, position_ids, attention, ssd, tables, ages
        )

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        local_cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Of a `parallel.context.LocalBatch`; without context parallelism cu_seqlens is enough.

        Returns hidden states [T or T/tp, 1, hidden]; on the last stage the summed loss, a float32
        scalar, and that of every token, float32 [T], which has no gradient; with gradients switched
        off also, float32 [T], 1 where another token than the label is the likeliest.
        """
        h = self.hidden(tokens, position_ids, cu_seqlens, local_cu_seqlens)
        if not self.last:
            return h
        u = enter_tensor_parallel(h, self.config).squeeze(1)  # [T, hidden]
        weight, valid = self._head()
        given = u, weight, labels.reshape(-1), loss_mask.reshape(-1), valid
        return head_loss(*given, self.z_loss) if torch.is_grad_enabled() else head_scores(*given)

    def hidden(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        local_cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Through this stage's layers (and the final norm, on the last): [T or T/tp, 1, hidden]."""
        positions = self.positions(position_ids, cu_seqlens, local_cu_seqlens)
        if self.first:
            h = self.model.word_embed(tokens.reshape(1, -1))  # [1, T, hidden] or [T/tp, 1, hidden]
            h = h if self.config.sequence_parallel else h.transpose(0, 1)
        else:
            assert self._input is not None
            h, self._input = self._input, None  # the schedule decides how long it lives
        normed = None  # the norm of h that the next layer reads, if there is one already
        layers = cast(list[DecoderLayer], list(self.model.layers.values()))
        for n, layer in enumerate(layers):
            if self.recomputes[n]:
                h, normed = recomputed(layer, h, None, positions, None)  # keeps h alone
                continue
            if normed is None:
                h, normed = layer.pre_sequence_layernorm(h)
            h, normed = layer(h, normed, positions, self._norm_after(n, layers))
        if not self.last:
            return h.contiguous()
        return self.model.final_layernorm(h)[1] if normed is None else normed

    def _norm_after(self, n: int, layers: list[DecoderLayer]) -> RMSNorm | None:
        """The norm that reads the output of the n-th layer; None where there is none, and where a
        layer that is recomputed has its own inside."""
        if n + 1 == len(layers):
            return self.model.final_layernorm if self.last else None
        return None if self.recomputes[n + 1] else layers[n + 1].pre_sequence_layernorm

    def logits(self, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits [T, vocab / tp] of a stage that is the last; for inspection."""
        u = enter_tensor_parallel(self.hidden(tokens, position_ids, cu_seqlens), self.config)
        return head_logits(u.squeeze(1), *self._head())

    def _head(self) -> tuple[Tensor, int]:
        """The output matrix [vocab / tp, hidden] and how many of its rows are tokens."""
        holder = self.model.word_embed if self.tied_head else self.lm_head
        return holder.weight, self.model_config.vocab_size - holder.vocab_start_index
