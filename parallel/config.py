"""Model and layout configuration. Imports neither torch nor Megatron-core."""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from parallel import bounds

# Required keys of model.rope_scaling by rope_type, and those it may have besides
ROPE_SCALING_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
}
SHOWN_DIVISORS = 16
VOCAB_MULTIPLE = 128  # vocabulary padding: fixed, so that it does not depend on the layout


class Section(BaseModel):
    """A frozen part of the configuration tree that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """TransXSSM's shape (paper, section 3 and Table 4)."""

    vocab_size: int = Field(8192, ge=2, le=bounds.VOCABULARY)
    """Number of token ids; rows of the embedding table before padding."""
    hidden_size: int = Field(256, ge=1, le=bounds.WIDTH)
    """Width of the residual stream."""
    intermediate_size: int = Field(512, ge=1, le=bounds.WIDTH)
    """Width of the SwiGLU feed-forward."""
    num_layers: int = Field(8, ge=1, le=bounds.LAYERS)
    """Decoder layers of both kinds together."""
    num_heads: int = Field(4, ge=1, le=bounds.HEADS)
    """Heads of attention and of the SSD scan."""
    num_kv_heads: int = Field(4, ge=1, le=bounds.HEADS)
    """Key/value heads of attention (GQA)."""
    head_dim: int = Field(64, ge=2, le=bounds.HEAD)
    """Width P of a head."""
    state_dim: int = Field(64, ge=2, le=bounds.HEAD)
    """Width N of the SSD state."""
    ssd_groups: int = Field(4, ge=1, le=bounds.HEADS)
    """Groups of B and C, each shared by num_heads / ssd_groups heads."""
    chunk_size: int = Field(0, ge=0, le=bounds.HEAD)
    """SSD chunk length; 0 chooses by a fixed table (kernels/ssd/chunked.py)."""
    attn_layer_period: int = Field(8, ge=1, le=bounds.COUNT)
    """Layer i is attention when i % attn_layer_period == attn_layer_offset, else SSD."""
    attn_layer_offset: int = Field(7, ge=0, le=bounds.COUNT)
    """See attn_layer_period. An offset ≥ the period gives a model without attention."""
    rope: Literal["unified", "attention_only", "none"] = "unified"
    """Where rotary positions enter: attention and SSD, attention alone, nowhere."""
    ssd_skip: bool = False
    """Add D ⊙ x to the SSD output."""
    ssd_conv_width: int = Field(0, ge=0, le=256)
    """Causal depthwise convolution on x, B, C of this width; 0 has none."""
    rope_theta: float = Field(10000.0, gt=1, le=1e18)
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] = Field(default_factory=dict)
    """Empty, or Hugging Face's rope_scaling keys with rope_type linear, yarn or llama3."""
    rms_norm_eps: float = Field(1e-6, ge=bounds.SMALLEST, le=1)
    tie_word_embeddings: bool = True
    """The output head uses the embedding matrix."""
    init_std: float = Field(0.02, ge=bounds.SMALLEST, le=100)
    """Standard deviation of projections and embeddings at initialisation."""
    max_position_embeddings: int = Field(4096, ge=1, le=bounds.LENGTH)
    """Longest position the rotary table is meant for."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        for field in ("num_kv_heads", "ssd_groups"):
            value = getattr(self, field)
            if self.num_heads % value:
                raise ValueError(
                    f"model.{field}={value} does not divide model.num_heads={self.num_heads}; "
                    f"use one of {some_divisors(self.num_heads, value)}"
                )
        for field in ("head_dim", "state_dim"):
            if getattr(self, field) % 2:
                raise ValueError(
                    f"model.{field}={getattr(self, field)} is odd; the rotation pairs dimensions, "
                    "use an even number"
                )
        if self.chunk_size and self.chunk_size & (self.chunk_size - 1):
            raise ValueError(
                f"model.chunk_size={self.chunk_size} is not a power of two; "
                "use 0 (choose by table), 64, 128 or 256"
            )
        return self

    @model_validator(mode="after")
    def _check_rope_scaling(self) -> "ModelConfig":
        scaling = dict(self.rope_scaling)
        if not scaling:
            return self
        kind = scaling.pop("rope_type", scaling.pop("type", None))
        if not isinstance(kind, str) or kind not in ROPE_SCALING_KEYS:
            raise ValueError(
                f"model.rope_scaling has rope_type={printed(kind)}; use linear, yarn or llama3 "
                "(dynamic depends on the longest position of a batch, so it cannot be reproduced "
                "when documents are packed), or leave rope_scaling empty"
            )
        required, optional = ROPE_SCALING_KEYS[kind]
        if missing := sorted(required - scaling.keys()):
            raise ValueError(f"model.rope_scaling of type {kind} lacks {', '.join(missing)}")
        for key, value in scaling.items():
            if key not in required | optional:
                known = ", ".join(sorted(required | optional))
                raise ValueError(
                    f"model.rope_scaling.{printed(key)} is unknown; type {kind} has {known}"
                )
            _check_rope_value(key, value)
        return self

    def is_attention(self, layer: int) -> bool:
        """Whether the 0-based global `layer` is an attention layer."""
        return layer % self.attn_layer_period == self.attn_layer_offset

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table in memory: a fixed multiple, whatever the layout."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def num_params(self) -> dict[str, int]:
        """Trainable parameters by kind: embedding, ssd, attention, feed_forward, norm; total."""
        hidden, heads, width = self.hidden_size, self.num_heads, self.head_dim
        embedding = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        bc = self.ssd_groups * self.state_dim
        ssd = 2 * hidden * heads * width + 2 * hidden * bc + hidden * heads + 2 * heads
        ssd += heads * self.ssd_skip + (heads * width + 2 * bc) * self.ssd_conv_width
        attention = 2 * hidden * heads * width + 2 * hidden * self.num_kv_heads * width
        num_attention = sum(self.is_attention(i) for i in range(self.num_layers))
        counts = {
            "embedding": embedding,
            "ssd": ssd * (self.num_layers - num_attention),
            "attention": attention * num_attention,
            "feed_forward": 3 * hidden * self.intermediate_size * self.num_layers,
            "norm": 4 * hidden * self.num_layers + hidden,  # norms and residual weights
        }
        return counts | {"total": sum(counts.values())}


def _check_rope_value(key: str, value: Any) -> None:
    """Raises ValueError for a value that the scaling cannot compute with."""
    if key == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"model.rope_scaling.truncate={printed(value)} must be true or false")
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not bounds.SMALLEST <= value <= bounds.COUNT:
        raise ValueError(
            f"model.rope_scaling.{key}={printed(value)} must be a positive number, at most "
            f"{bounds.COUNT:,}"
        )
    if key == "original_max_position_embeddings" and value != int(value):
        raise ValueError(f"model.rope_scaling.{key}={value!r} must be a whole number of tokens")


def printed(value: Any) -> str:
    """A refused value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python prints, or too deep
        return f"<{type(value).__name__} that is too large to print>"
    return text if len(text) <= 200 else text[:200] + "..."


def some_divisors(n: int, near: int) -> list[int]:
    """Divisors of n, rising: all where they are few, else those nearest to `near`."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    every = sorted({*low, *(n // d for d in low)})
    return sorted(sorted(every, key=lambda d: abs(d - near))[:SHOWN_DIVISORS])


class ParallelConfig(Section):
    """How the model is laid out over processes; data parallel = world / (tensor · pipeline ·
    context)."""

    tensor: int = Field(1, ge=1, le=bounds.RANKS)
    """Ranks that split heads, feed-forward columns and vocabulary."""
    pipeline: int = Field(1, ge=1, le=bounds.RANKS)
    """Stages that split the layers."""
    virtual_pipeline: int = Field(1, ge=1, le=bounds.LAYERS)
    """Chunks of layers on each stage, taken in turns (interleaved 1F1B): a smaller bubble for more
    sends."""
    context: int = Field(1, ge=1, le=bounds.RANKS)
    """Ranks that split every sequence: attention exchanges heads, SSD passes states."""
    sequence: bool | Literal["auto"] = "auto"
    """Split activations between tensor-parallel regions over tokens; auto: when tensor > 1."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: shard nothing (0), optimizer state (1), gradients (2), parameters (3); 1 when
    pipelined."""
    offload: Literal["none", "optimizer"] = "none"
    """Keep master weights and Adam's moments, and make the update, on the host's CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward recomputes: nothing, what mixers keep between their projections (rotations,
    scan states, attention), or all of every layer."""
    recompute_layers: int = Field(0, ge=0, le=bounds.LAYERS)
    """Layers that do so, the first of every chunk; 0: all."""
    pipeline_split: Literal["balanced"] | list[int] = "balanced"
    """Layers per chunk (pipeline · virtual_pipeline chunks, in the model's order): chosen by cost,
    or an explicit list that sums to model.num_layers."""

    @property
    def model_ranks(self) -> int:
        """Of one model replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations are split over tokens inside the tensor-parallel group."""
        return self.tensor > 1 and self.sequence in ("auto", True)

    @property
    def reduces_in_backward(self) -> bool:
        """Whether DeepSpeed's hooks sum gradients during backward, or one call does after it."""
        return self.zero_stage > 1 or self.offload == "optimizer"

    def recompute_of(self, n: int) -> Literal["none", "selective", "full"]:
        """What the n-th layer of a chunk recomputes."""
        return self.recompute if n < self.recompute_layers or not self.recompute_layers else "none"

    @property
    def num_chunks(self) -> int:
        """Runs of consecutive layers; chunk i is on stage i mod pipeline."""
        return self.pipeline * self.virtual_pipeline
