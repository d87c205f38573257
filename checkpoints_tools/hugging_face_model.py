"""The single-GPU model under the interface of Hugging Face transformers 4.57 and 5.

`checkpoints_tools.hugging_face` joins this file and the model's own into the modelling file of an
export, so nothing here may need more than torch and transformers. Parameter names stay those of
the single-GPU model. With tied embeddings lm_head is a module all the same, whose weight is the
embedding's, as offloading and adapters work on modules; files do not hold it.
"""

from dataclasses import MISSING, fields
from typing import Any

import torch
import transformers
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
    new_slots,
    real_positions,
)

# The name that `generate` uses for the cache: past_key_values until transformers 5.2x renamed it.
OUTPUT_FIELDS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE_FIELD = "cache" if "cache" in OUTPUT_FIELDS else "past_key_values"
OTHER_POSITIONS = (
    "position_ids are others than follow from attention_mask, so they are not supported by "
    "TransXSSM: leave them out. A row is one sequence, padded at any side; documents packed into a "
    "row would see each other."
)
# Refused by `forward`. They are not in its signature, and position_ids are neither, because
# `generate` gives what it finds there.
NOT_SUPPORTED = {
    "output_attentions": "attention is computed without its matrix of weights",
    **dict.fromkeys(
        ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens"),
        "one row is one sequence here; pad rows instead of packing documents into them",
    ),
}


class TransXSSMPretrainedConfig(PretrainedConfig):
    """config.json for transformers: the fields of TransXSSMConfig and those of its base class."""

    model_type = "transxssm"
    # a list, to which Trainer adds
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
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


class GenerationCache(Cache, transformers.Cache):
    """SSD states, convolution tails, keys and values, with what `generate` asks of a cache.

    transformers 4 compiles steps with caches of its own class alone.
    """

    is_croppable = False  # a state cannot forget its last tokens
    is_linear = (True,)  # `generate` then leaves the slicing of its inputs to the model

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the steps after the prompt; it does so on GPUs only."""
        return self.capacity is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens it remembers, padding included; waits for the device if static."""
        return int(self.length)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The most tokens that it can hold. -1: it grows without end."""
        return -1 if self.capacity is None else self.capacity

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
    supports_gradient_checkpointing = True
    _no_split_modules = ("Layer",)
    _skip_keys_device_placement = ("past_key_values", "cache")
    # transformers 4 takes the keys alone
    _tied_weights_keys = {"lm_head.weight": "model.word_embed.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # no decoding that takes tokens back
    static_capacity = 1  # of the last static cache that `generate` made

    def __init__(self, config: TransXSSMPretrainedConfig) -> None:
        super().__init__(config)
        self.checked = config.checked()
        self.model = Backbone(self.checked)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        # transformers refuses names that no parameter has
        present = {name.rsplit(".", 1)[-1] for name, _ in self.named_parameters()}
        self._keep_in_fp32_modules_strict = [n for n in FLOAT32_PARAMETERS if n in present]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, device_map: Any = None, **named: Any) -> Any:
        """The model of a folder. A tied head goes where device_map has the embedding."""
        tied = getattr(named.get("config"), "tie_word_embeddings", False)
        if tied and isinstance(device_map, dict):
            parents = [f for f in ("model.word_embed", "model", "") if f in device_map]
            device_map = device_map | {"lm_head": device_map[parents[0]]} if parents else device_map
        return super().from_pretrained(*arguments, device_map=device_map, **named)

    @classmethod
    def _load_pretrained_model(cls, *arguments: Any, **named: Any) -> Any:
        """What transformers makes of it, with a right index of the weights that stay on disk.

        That of transformers 4.57 lacks a tied head, and has float32 weights rounded to the dtype of
        the others.
        """
        loaded = super()._load_pretrained_model(*arguments, **named)
        for index in [part for part in loaded if isinstance(part, dict)]:
            source, head = "model.word_embed.weight", "lm_head.weight"
            model = next(a for a in (*arguments, *named.values()) if isinstance(a, cls))
            if source in index and model.config.tie_word_embeddings:
                index.setdefault(head, index[source])
            for name in index:
                if name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS:
                    index[name]["dtype"] = "float32"
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A fresh value for parameters that no file filled, of a module that may be new."""
        names = {id(p): name for name, p in self.named_parameters()}
        for p in module.parameters(recurse=False):
            if not getattr(p, "_is_hf_initialized", False):
                p.copy_(initial_value(names.get(id(p), ""), p.shape, self.checked, None))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.word_embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.word_embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: GenerationCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits float32 [B, L, vocab] of input_ids [B, L], and the loss where labels are given.

        attention_mask [B, cached + L], with a static cache [B, capacity] and 1 for tokens to come,
        is 0 for padding, at any side of a row. labels [B, L] are input_ids, not shifted, with -100
        where no loss is wanted: at padding, and at the first token after it, which nothing
        predicts. past_key_values, in newer transformers cache, is what an earlier call returned,
        and is updated in place.
        inputs_embeds [B, L, hidden] may take the place of input_ids. hidden_states, on request:
        what enters every layer, and what enters the head. logits_to_keep: only the last so many
        logits, or those at these indices; 0: all. position_ids [B, L] may be given where they
        follow from attention_mask. Others go to the loss. Raises ValueError for other positions,
        for arguments in NOT_SUPPORTED, and for input that does not fit the cache.
        """
        for name, reason in NOT_SUPPORTED.items():
            value = others.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported by TransXSSM, leave it out: {reason}.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give input_ids or inputs_embeds: exactly one of them.")
        memory = past_key_values if cache is None else cache
        if memory is not None and not isinstance(memory, GenerationCache):
            raise ValueError(
                f"The cache is a {type(memory).__name__}, which holds no SSD states: give what an "
                "earlier call of this model returned, or none."
            )
        batch, length = given.shape[:2]
        if length == 0 and (memory is None or memory.length):
            seen = 0 if memory is None else memory.get_seq_length()
            raise ValueError(f"input_ids holds no token beyond the {seen} in the cache: add some.")
        check_positions(others.pop("position_ids", None), attention_mask, memory, length)
        if use_cache is None:  # in training it would only hold memory
            use_cache = self.config.use_cache and not self.training
        again = torch.is_grad_enabled() and self.model.layers[0].gradient_checkpointing
        if memory is None and use_cache and not again:  # layers with a cache run once
            memory = GenerationCache(self.checked)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] | None = [] if output_hidden_states else None
        if length == 0:  # transformers 4 reads a prompt of one token in pieces: first none of it
            hidden = self.lm_head.weight.new_zeros(batch, 0, self.config.hidden_size)
        else:
            hidden = self.model(
                input_ids,
                memory,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                each=states,
            )
        if states is not None:
            states.append(hidden)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep]).float()
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **others)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=None if states is None else tuple(states),
            **{CACHE_FIELD: memory},
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: transformers has no cache that holds SSD states."""
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """An empty cache where none is given: a prompt that is read in pieces wants one.

        A static one, where asked for, is no shorter than the last, which spares compiling again.
        """
        given = model_kwargs.get(CACHE_FIELD) is not None or generation_config.use_cache is False
        static = generation_config.cache_implementation == "static"
        if given or not static:  # to which it would say that it ignores "static"
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if given:
            return
        if static:
            self.static_capacity = max(self.static_capacity, max_cache_length)
        capacity = self.static_capacity if static else None
        model_kwargs[CACHE_FIELD] = GenerationCache(self.checked, capacity)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        cache: GenerationCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        next_sequence_length: int | None = None,
        is_first_iteration: bool | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for the tokens that the cache has not seen.

        input_ids are all tokens so far, or new ones alone. transformers 5 says how many are new,
        or, with is_first_iteration alone, that all are; for 4 the attention_mask tells it.
        """
        memory = past_key_values if cache is None else cache
        seen = 0 if memory is None else memory.get_seq_length()
        so_far = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        if next_sequence_length is None:
            next_sequence_length = input_ids.shape[1]
            if is_first_iteration is None:
                next_sequence_length = min(next_sequence_length, max(0, so_far - seen))
        tokens = input_ids[:, input_ids.shape[1] - next_sequence_length :].contiguous()
        given = {"input_ids": tokens}
        if inputs_embeds is not None and seen < inputs_embeds.shape[1]:
            tokens = inputs_embeds[:, seen:].contiguous()
            given = {"inputs_embeds": tokens}
        if position_ids is not None:
            # transformers 4 counts padding, too, in those it makes for a piece of a prompt, and
            # gives those of the prompt again for every token that follows
            own = cache_position is not None and torch.equal(position_ids, cache_position[None])
            of_prompt = cache_position is not None and position_ids.shape[-1] != so_far
            last = position_ids[..., max(0, position_ids.shape[-1] - tokens.shape[1]) :]
            position_ids = None if own or of_prompt else last
        if memory is not None and memory.capacity is not None and attention_mask is not None:
            missing = memory.capacity - attention_mask.shape[1]
            if missing < 0:
                raise ValueError(
                    f"The static cache has room for {memory.capacity} tokens, too few for "
                    f"{attention_mask.shape[1]}: begin with a longer one or a dynamic one."
                )
            attention_mask = nn.functional.pad(attention_mask, (0, missing), value=1)
        return {
            **given,
            "attention_mask": attention_mask,
            CACHE_FIELD: memory,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "position_ids": position_ids,
            **{n: others[n] for n in ("output_hidden_states", *NOT_SUPPORTED) if n in others},
        }


def check_positions(
    position_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None, length: int
) -> None:
    """Raise ValueError for position_ids [B, L] of real tokens that the mask does not give.

    The mask is of tokens in the cache and `length` new ones; None: nothing is padding. A compiled
    graph raises RuntimeError instead, where it runs.
    """
    if position_ids is None:
        return
    slots, width = new_slots(cache, length, position_ids.device)
    if position_ids.shape[-1] != length:
        raise ValueError(OTHER_POSITIONS)
    if attention_mask is None:
        everywhere = torch.arange(width, device=position_ids.device)
        wrong = position_ids != everywhere[slots]
    else:
        real = attention_mask.bool().to(position_ids.device)
        wrong = (position_ids != real_positions(real, slots)) & real[:, slots]
    if torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), OTHER_POSITIONS)
    elif bool(wrong.any()):
        raise ValueError(OTHER_POSITIONS)
