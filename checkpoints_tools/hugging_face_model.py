"""The single-GPU model under the interface of Hugging Face transformers 4.57 and 5.

`checkpoints_tools.hugging_face` joins this file and the model's own into the modelling file of an
export, so nothing here may need more than torch and transformers. Parameter names stay those of
the single-GPU model; with tied embeddings there is no lm_head.
"""

from dataclasses import MISSING, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from checkpoints_tools.single_gpu import (
    FLOAT32_PARAMETERS,
    Backbone,
    Cache,
    ModelError,
    SSDCache,
    TransXSSMConfig,
    initial_value,
    linear,
)

# The name that `generate` uses for the cache: past_key_values until transformers 5.2x renamed it.
OUTPUT_FIELDS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE_FIELD = "cache" if "cache" in OUTPUT_FIELDS else "past_key_values"
# Not in `forward`'s signature, because `generate` gives what it finds there.
NOT_SUPPORTED = {"position_ids", "inputs_embeds", "output_attentions", "output_hidden_states"}


class TransXSSMPretrainedConfig(PretrainedConfig):
    """config.json for transformers: the fields of TransXSSMConfig and those of its base class."""

    model_type = "transxssm"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    has_no_defaults_at_init = True  # so that every field is saved
    # A plain field: transformers 5 makes it a property that rewrites the value.
    rope_scaling = None

    def __init__(self, *, use_cache: bool = True, **values: Any) -> None:
        own = {}
        for field in fields(TransXSSMConfig):
            if field.name not in ("model_type", "dtype"):
                default = None if field.default is MISSING else field.default
                own[field.name] = values.pop(field.name, default)
        for name, value in own.items():
            setattr(self, name, value)
        self.use_cache = use_cache
        # the base class of transformers 4 would set these to its own defaults
        base = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        super().__init__(**{name: own[name] for name in base}, **values)

    def checked(self) -> TransXSSMConfig:
        """The model's own configuration. Raises ModelError for values it cannot have."""
        own = [f for f in fields(TransXSSMConfig) if f.name not in ("model_type", "dtype")]
        values = {field.name: getattr(self, field.name) for field in own}
        missing = [f.name for f in own if f.default is MISSING and values[f.name] is None]
        if missing:
            raise ModelError(f"The configuration lacks {', '.join(missing)}: give every size.")
        return TransXSSMConfig(**values)


class GenerationCache(Cache):
    """SSD states, convolution tails, keys and values, with what `generate` asks of a cache."""

    is_compileable = False
    is_croppable = False  # a state cannot forget its last tokens
    is_linear = (True,)  # `generate` then leaves the slicing of its inputs to the model

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens it remembers, padding included."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows without end."""
        return -1

    def crop(self, max_length: int) -> None:
        raise NotImplementedError(
            "The cache of TransXSSM cannot be cut: its SSD layers keep one state, not the tokens. "
            "Start from an empty cache."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i be what row beam_idx[i] was: beams that go on, others that end."""
        for layer in self.layers:
            names = ("state", "conv_tail") if isinstance(layer, SSDCache) else ("keys", "values")
            for name in names:
                tensor = getattr(layer, name)
                if tensor is not None:
                    setattr(layer, name, tensor.index_select(0, beam_idx.to(tensor.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        tensors = (t for layer in self.layers for t in vars(layer).values())
        rows = next(len(t) for t in tensors if isinstance(t, Tensor))
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))


class TransXSSMForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; `from_pretrained`, `generate` and Trainer work as for any other."""

    config_class = TransXSSMPretrainedConfig
    base_model_prefix = "model"
    _no_split_modules = ("Layer",)
    _skip_keys_device_placement = ("past_key_values", "cache")
    _supports_sdpa = True
    _is_stateful = True  # no decoding that takes tokens back

    def __init__(self, config: TransXSSMPretrainedConfig) -> None:
        super().__init__(config)
        self.checked = config.checked()
        self.model = Backbone(self.checked)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size)
        # transformers refuses names that no parameter has
        present = {name.rsplit(".", 1)[-1] for name, _ in self.named_parameters()}
        self._keep_in_fp32_modules_strict = [n for n in FLOAT32_PARAMETERS if n in present]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A fresh value for parameters that no file filled."""
        names = {id(p): name for name, p in self.named_parameters()}
        for p in module.parameters(recurse=False):
            if not getattr(p, "_is_hf_initialized", False):
                p.copy_(initial_value(names[id(p)], p.shape, self.checked, None))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.word_embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.word_embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear | None) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: GenerationCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits float32 [B, L, vocab] of input_ids [B, L], and the loss where labels are given.

        attention_mask [B, cached + L] is 0 for padding, at any side of a row. labels [B, L] are
        input_ids, not shifted, with -100 where no loss is wanted: at padding, and at the first
        token after it, which nothing predicts. past_key_values, in newer
        transformers cache, is what an earlier call returned, and is updated in place.
        logits_to_keep: only the last so many logits, or those at these indices; 0: all. Others go
        to the loss. Raises ValueError for arguments in NOT_SUPPORTED.
        """
        for name in NOT_SUPPORTED & set(others):
            value = others.pop(name)
            if value is not None and value is not False:
                raise ValueError(
                    f"{name} is not supported by TransXSSM: leave it out. It takes input_ids, and "
                    "positions follow from attention_mask."
                )
        memory = past_key_values if cache is None else cache
        if input_ids.shape[1] == 0:
            seen = 0 if memory is None else memory.length
            raise ValueError(f"input_ids holds no token beyond the {seen} in the cache: add some.")
        if use_cache is None:  # in training it would only hold memory
            use_cache = self.config.use_cache and not self.training
        if memory is None and use_cache:
            memory = GenerationCache(self.checked)
        hidden = self.model(input_ids, memory, attention_mask=attention_mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.model.word_embed if self.lm_head is None else self.lm_head
        logits = F.linear(hidden[:, keep], head.weight).float()
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **others)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: memory})
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: `forward` makes the cache, as transformers has none that holds SSD states."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        cache: GenerationCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for the tokens that the cache has not seen."""
        memory = past_key_values if cache is None else cache
        seen = 0 if memory is None else memory.length
        so_far = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        if seen and so_far == input_ids.shape[1]:  # otherwise these are new tokens alone
            input_ids = input_ids[:, seen:]
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            CACHE_FIELD: memory,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **{name: others[name] for name in NOT_SUPPORTED & set(others)},  # refused there
        }
