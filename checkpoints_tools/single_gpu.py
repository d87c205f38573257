"""TransXSSM on one device: for inference, evaluation and fine-tuning.

    h = E[t];   for each layer   h ← r₁ ⊙ h + Mixer(RMSNorm(h));   h ← r₂ ⊙ h + SwiGLU(RMSNorm(h))
    logits = RMSNorm(h) Eᵀ                       (or a separate lm_head when embeddings are untied)

    Attention   causal softmax(QKᵀ/√head_dim) V, grouped queries; one layer in attn_layer_period
    SSD         S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t b_tᵀ,  y_t = S_t c_t (+ D x_t); all the others

One table of rotary angles turns Q and K in attention, C and B in SSD. A `Cache` carries K/V and the
states S, so that a prompt, a few more tokens, or one token are all the same `forward`. Long scans
use TransXSSM's `kernels` package when that is installed, unless torch.compile traces the model.

The file needs torch alone, and stands alone, because `hugging_face` generates the Hugging Face
modelling file of an export from it.
"""

import contextlib
import functools
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

# Fields that Hugging Face's save_pretrained writes for itself and that do not change the model.
HF_BOOKKEEPING = {"architectures", "auto_map", "transformers_version", "use_cache"}
# rope_scaling: the keys each rope_type needs, and those it may have.
ROPE_SCALING: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor"},
        {"original_max_position_embeddings"},
    ),
    "yarn": (
        {"factor"},
        {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"},
    ),
}
# The JSON types that a field's annotation admits; others are checked where they are used.
FIELD_TYPES: dict[Any, tuple[type, ...]] = {
    int: (int,),
    float: (float, int),
    bool: (bool,),
    str: (str,),
    int | None: (int, type(None)),
    dict[str, Any] | None: (dict, type(None)),
}
# Kept in float32 whatever the model's dtype: rounding A or Δ compounds over the whole sequence.
FLOAT32_PARAMETERS = ("A_log", "dt_bias", "D")
ROUNDED = (
    "TransXSSM: A_log, dt_bias and D are {dtype}, not float32. A cast of the whole model or FSDP's "
    "mixed precision has rounded them, so the states of its SSD layers decay at other rates than "
    "in training; the README.md of an export says how to keep them float32."
)
FALLBACK_CHUNK = 64
SMALLEST, LARGEST = 1e-37, 1e18  # of numbers that frequencies are computed from
MOST = 1 << 53  # integers beyond are no sizes, and their products take long to print
# softplus(NO_STEP + dt_bias) is 0 exactly: Δ of a padded token, which so leaves the state alone.
NO_STEP = -1e4


class ModelError(Exception):
    """A model folder or configuration that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class TransXSSMConfig:
    """config.json, field by field."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    state_dim: int = 0  # 0: head_dim
    ssd_groups: int = 0  # 0: num_attention_heads
    ssd_chunk_size: int = 0  # 0: chosen by the scan
    ssd_skip: bool = False
    ssd_conv_width: int = 0
    attn_layer_period: int = 8
    attn_layer_offset: int = 7
    rope: str = "unified"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 4096
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    model_type: str = "transxssm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_dim", self.state_dim or self.head_dim)
        object.__setattr__(self, "ssd_groups", self.ssd_groups or self.num_attention_heads)
        if self.model_type != "transxssm":
            raise ModelError(f"model_type={self.model_type!r:.80} is not 'transxssm'.")
        if self.rope not in ("unified", "attention_only", "none"):
            raise ModelError(f"rope={self.rope!r:.80}: use unified, attention_only or none.")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for name in (*sizes, "num_attention_heads", "attn_layer_period", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}={getattr(self, name)} is not positive.")
        if not 1 < self.rope_theta <= LARGEST:  # NaN is not
            raise ModelError(f"rope_theta={self.rope_theta} is not between 1 and {LARGEST:g}.")
        if not 0 <= self.rms_norm_eps <= 1:
            raise ModelError(f"rms_norm_eps={self.rms_norm_eps} is not between 0 and 1.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ModelError(f"{name}={token} is no token of vocab_size={self.vocab_size}.")
        for name in ("ssd_chunk_size", "ssd_conv_width", "attn_layer_offset"):
            if getattr(self, name) < 0:
                raise ModelError(f"{name}={getattr(self, name)} is negative.")
        for name in ("num_key_value_heads", "ssd_groups"):
            value = getattr(self, name)
            if value < 1 or self.num_attention_heads % value:
                heads = self.num_attention_heads
                raise ModelError(f"{name}={value} does not divide num_attention_heads={heads}.")
        for name in ("head_dim", "state_dim"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ModelError(f"{name}={getattr(self, name)} is not a positive even number.")
        kind, keys = self.rope_scaling_type, set(self.rope_scaling or {}) - {"rope_type", "type"}
        if kind not in ROPE_SCALING:
            types = ", ".join(ROPE_SCALING)
            raise ModelError(f"rope_scaling type {kind!r:.80}: use one of {types}.")
        required, optional = ROPE_SCALING[kind]
        if missing := required - keys:
            raise ModelError(f"rope_scaling of type {kind!r} lacks {some_names(missing)}.")
        if unknown := keys - required - optional:
            raise ModelError(
                f"rope_scaling of type {kind!r} has unknown keys {some_names(unknown)}."
            )
        for key in keys:
            check_rope_value(key, (self.rope_scaling or {})[key], key in required)

    @property
    def rope_scaling_type(self) -> str:
        """Hugging Face's rope_type (`type` in older files)."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))

    def is_attention(self, layer: int) -> bool:
        """Whether the 0-based `layer` is an attention layer."""
        return layer % self.attn_layer_period == self.attn_layer_offset

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "TransXSSMConfig":
        """Take the values of config.json; unknown and missing fields are errors."""
        values = {name: value for name, value in values.items() if name not in HF_BOOKKEEPING}
        if unknown := set(values) - {field.name for field in fields(cls)}:
            raise ModelError(
                f"config.json has unknown fields: {some_names(unknown)}. They might change the "
                "model in a way this version does not know; remove them if they do not."
            )
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := required - set(values):
            raise ModelError(f"config.json lacks {some_names(missing)}.")
        for field in fields(cls):
            kinds = FIELD_TYPES.get(field.type)
            if type(number := values.get(field.name)) is int and abs(number) >= MOST:
                raise ModelError(f"config.json: {field.name} is a number of {MOST} or more.")
            # type() and not isinstance: a JSON true is not a number here
            if kinds and field.name in values and type(values[field.name]) not in kinds:
                value = f"{json.dumps(values[field.name]):.80}"
                raise ModelError(f"config.json: {field.name}={value} is not {kinds[0].__name__}.")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def check_rope_value(key: str, value: Any, required: bool) -> None:
    """Raise ModelError for a value of rope_scaling that the frequencies cannot be computed with."""
    if key == "truncate":
        sound = type(value) is bool
    elif value is None or value == 0:  # as if it were not there
        sound = not required and type(value) is not bool
    else:
        sound = type(value) in (int, float) and SMALLEST <= value <= LARGEST
    if not sound:
        raise ModelError(f"rope_scaling: {key}={value!r:.80} is not a value that it can have.")


def some_names(names: set[str], limit: int = 8) -> str:
    """Names for an error message: sorted, and no longer than a paragraph."""
    shown = ", ".join(f"{name:.80}" for name in sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# ------------------------------------------------------------------------------------ rotation


def rotary_frequencies(config: TransXSSMConfig, dim: int) -> tuple[Tensor, float]:
    """(theta^(-2k/dim) float64 [dim/2] after rope_scaling, factor on cos and sin).

    A scaled frequency is f/factor (interpolated) where the pair turns slowly over the original
    context, f where it turns fast, and a blend between; linear scaling interpolates all of them.
    """
    freq = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    scaling, kind = config.rope_scaling or {}, config.rope_scaling_type
    if kind == "default":
        return freq, 1.0
    factor = float(scaling["factor"])
    if kind == "linear":
        return freq / factor, 1.0
    context = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = context * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return freq * (keep + (1 - keep) / factor), 1.0

    # YaRN blends linearly in the pair's index, between the indices where a pair makes
    # beta_fast and beta_slow turns over the original context.
    def index_of(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = index_of(scaling.get("beta_fast") or 32)
    last = index_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = torch.arange(dim // 2, dtype=torch.float64, device="cpu") - first
    keep = 1 - (ramp / ((last - first) or 0.001)).clamp(0, 1)

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = magnitude(1.0)
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
    return freq * (keep + (1 - keep) / factor), float(attention_factor)


class Angles:
    """cos and sin float32 [L, dim/2], or [B, L, dim/2] where rows differ, as layers take them.

    Not a tuple: mixed precision of FSDP would round the tensors in it. Offloading calls `to`.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def to(self, device: torch.device, **options: Any) -> "Angles":
        return Angles(self.cos.to(device, **options), self.sin.to(device, **options))


class RotaryTable:
    """cos and sin by position, built when first needed.

    Not a buffer: a model made on the meta device would leave it uninitialised, and a cast of the
    model to bfloat16 would round the angles.
    """

    def __init__(self, config: TransXSSMConfig, dim: int) -> None:
        self.config, self.dim = config, dim
        self.cos = self.sin = torch.empty(0, dim // 2, device="cpu")

    @torch.inference_mode(False)  # a table first built in inference mode could not train later
    def at(self, positions: slice | Tensor, end: int, device: torch.device) -> Angles:
        """Of positions before `end`, a slice or [L] or [B, L]: [.., L, dim/2]."""
        if end > len(self.cos):
            freq, magnitude = rotary_frequencies(self.config, self.dim)
            turns = torch.arange(max(end, 2 * len(self.cos)), dtype=torch.float64, device="cpu")
            angles = turns[:, None] * freq  # [positions, dim/2]
            self.cos = (angles.cos() * magnitude).float().to(device)
            self.sin = (angles.sin() * magnitude).float().to(device)
        if self.cos.device != device:
            self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return Angles(self.cos[positions], self.sin[positions])


def rotate(x: Tensor, angles: Angles | None) -> Tensor:
    """Turn the pairs (k, k + dim/2) of x [B, L, heads, dim] in float32."""
    if angles is None:
        return x
    cos, sin = (table.unsqueeze(-2) for table in (angles.cos, angles.sin))  # [.., L, 1, dim/2]
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


# ------------------------------------------------------------------------------------ the scan


@functools.cache
def kernels_ssd() -> Callable[..., Any] | None:
    """`ssd` of the project's kernels package, or None.

    Looked up by its full path, because Hugging Face publishes another package called kernels.
    """
    try:
        return getattr(importlib.import_module("kernels.ssd.ssd"), "ssd", None)
    except ImportError:
        return None


def chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The SSD recurrence, `chunk` steps at a time; float32 throughout.

    x [B, L, H, P]; dt [B, L, H] after softplus; A [H]; b, c [B, L, G, N] rotated; state
    [B, H, P, N]. Returns y [B, L, H, P] and the last state. With E_ts = exp(A Σ_{s<r≤t} Δ_r):

        y_t = Σ_{s≤t} E_ts Δ_s (c_t·b_s) x_s + E_t0 S_0 c_t
        S_T = Σ_s E_Ts Δ_s x_s b_sᵀ + E_T0 S_0
    """
    repeat = x.shape[2] // b.shape[2]
    outputs = []
    for start in range(0, x.shape[1], chunk):
        # [B, T, heads, dim] -> [B, heads, T, dim], the groups of b and c repeated to heads
        xs, bs, cs = (
            t[:, start : start + chunk].float().transpose(1, 2).repeat_interleave(r, dim=1)
            for t, r in ((x, 1), (b, repeat), (c, repeat))
        )
        step = dt[:, start : start + chunk].transpose(1, 2)  # [B, H, T]
        decay = step * A[:, None]
        since_start = decay.cumsum(-1)  # log E_t0
        e = decay_between(decay)  # [B, H, T, S], zero where s > t
        fed = xs * step[..., None]  # Δ_s x_s  [B, H, S, P]
        y = (e * (cs @ bs.mT)) @ fed
        y = y + since_start.exp()[..., None] * (cs @ state.mT)
        outputs.append(y)
        weighted = bs * e[..., -1, :, None]
        state = since_start[..., -1, None, None].exp() * state + fed.mT @ weighted
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def decay_between(decay: Tensor) -> Tensor:
    """E_ts = exp(Σ_{s<r≤t} decay_r) [.., T, T] of decay [.., T]; zero where s > t."""
    length = decay.shape[-1]
    # summed from s on: differences of two cumulative sums would cancel digits
    log_e = decay[..., None].expand(*decay.shape, length).tril(-1).cumsum(-2)
    return log_e.exp().tril()


def batched_scan(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """`chunked_scan` with all chunks at once: a graph that is no larger for longer sequences.

    Every chunk is scanned from an empty state, then gets what the states before it add.
    """
    batch, length = x.shape[:2]
    chunks = -(-length // chunk)
    missing = chunks * chunk - length  # Δ = 0 there leaves the state alone
    x, dt, b, c = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)).reshape(batch * chunks, chunk, *t.shape[2:])
        for t in (x, dt, b, c)
    )
    y, added = chunked_scan(x, dt, A, b, c, torch.zeros_like(state[:1]), chunk)
    since_start = (dt * A).cumsum(1)  # [B · chunks, T, H]
    decay = since_start[:, -1].unflatten(0, (batch, chunks)).transpose(1, 2)  # [B, H, chunks]
    # the first state, and what each chunk adds  [B, H, 1 + chunks, P, N]
    states = torch.cat([state[:, None], added.unflatten(0, (batch, chunks))], dim=1).transpose(1, 2)
    states = (decay_between(F.pad(decay, (1, 0))) @ states.flatten(-2)).view_as(states)
    before = states[:, :, :-1].transpose(1, 2).flatten(0, 1)  # [B · chunks, H, P, N]
    c = c.float().repeat_interleave(x.shape[2] // c.shape[2], dim=2)  # [B · chunks, T, H, N]
    y = y + since_start.exp()[..., None] * (c.transpose(1, 2) @ before.mT).transpose(1, 2)
    return y.reshape(batch, chunks * chunk, *y.shape[2:])[:, :length], states[:, :, -1]


def single_step(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`chunked_scan` of one token, L = 1: the recurrence as it is written."""
    repeat = x.shape[2] // b.shape[2]
    bs, cs = (t[:, 0].float().repeat_interleave(repeat, dim=1) for t in (b, c))  # [B, H, N]
    step = dt[:, 0]  # [B, H]
    fed = x[:, 0].float() * step[..., None]  # [B, H, P]
    state = (step * A).exp()[..., None, None] * state + fed[..., None] * bs[..., None, :]
    y = state @ cs[..., None]  # [B, H, P, 1]
    return y.squeeze(-1)[:, None], state


# ------------------------------------------------------------------------------------ caches


@dataclass
class SSDCache:
    """What an SSD layer remembers."""

    state: Tensor | None = None  # [B, H, P, N] float32
    conv_tail: Tensor | None = None  # [B, channels, width - 1], inputs of the convolution

    def keep(self, name: str, new: Tensor) -> None:
        setattr(self, name, new)


class StaticSSDCache(SSDCache):
    """Keeps its first tensors and writes later ones into them."""

    def keep(self, name: str, new: Tensor) -> None:
        old = getattr(self, name)
        if old is None:
            setattr(self, name, at_fixed_address(new))
        else:
            old.copy_(new)


@dataclass
class KVCache:
    """What an attention layer remembers; the buffers grow by doubling."""

    length: int = 0
    keys: Tensor | None = None  # [B, Hkv, capacity, head_dim]
    values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, Hkv, L, head_dim]; returns all keys and values so far."""
        start, end = self.length, self.length + keys.shape[2]
        self.keys = self._store(self.keys, keys, start, end)
        self.values = self._store(self.values, values, start, end)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @staticmethod
    def _store(buffer: Tensor | None, new: Tensor, start: int, end: int) -> Tensor:
        if buffer is None or end > buffer.shape[2]:
            old, capacity = buffer, max(64, 2 * end)
            buffer = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
            if old is not None:
                buffer[:, :, :start] = old[:, :, :start]
        buffer[:, :, start:end] = new
        return buffer


@dataclass
class StaticKVCache:
    """What an attention layer remembers, in buffers of a fixed size.

    The length is a tensor, so that no compiled graph depends on its value.
    """

    capacity: int
    length: int | Tensor = 0
    keys: Tensor | None = None  # [B, Hkv, capacity, head_dim], 0 where nothing is yet
    values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, Hkv, L, head_dim]; returns the whole buffers."""
        batch, heads, length, width = keys.shape
        if self.keys is None or self.values is None:
            shape = (batch, heads, self.capacity, width)
            self.keys = at_fixed_address(keys.new_zeros(shape))
            self.values = at_fixed_address(values.new_zeros(shape))
            self.length = zero_length(keys.device)
        slots = self.length + torch.arange(length, device=keys.device)
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)
        self.length += length
        return self.keys, self.values


def zero_length(device: torch.device) -> Tensor:
    return at_fixed_address(torch.zeros((), dtype=torch.long, device=device))


def at_fixed_address(tensor: Tensor) -> Tensor:
    """The tensor, which compiled graphs may now write to: CUDA graphs want inputs that stay."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


class Cache:
    """The memory of all layers after `length` tokens. Use it under torch.no_grad().

    With a capacity, the most tokens that it will ever hold, it is static: its tensors are made once
    and written in place, and a step that is compiled serves every token after it.
    """

    def __init__(self, config: TransXSSMConfig, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.length: Any = 0  # of a static cache that is in use a tensor [], as in its layers
        self.padded = False  # whether any of those tokens is padding
        self.layers: list[SSDCache | KVCache | StaticKVCache] = [
            self._layer(config.is_attention(i)) for i in range(config.num_hidden_layers)
        ]

    def _layer(self, is_attention: bool) -> SSDCache | KVCache | StaticKVCache:
        if self.capacity is None:
            return KVCache() if is_attention else SSDCache()
        return StaticKVCache(self.capacity) if is_attention else StaticSSDCache()


def new_slots(cache: Cache | None, length: int, device: torch.device) -> tuple[slice | Tensor, int]:
    """Columns of the next `length` tokens in an attention_mask, and how many it has."""
    if cache is None:
        return slice(length), length
    if cache.capacity is None:
        end = cache.length + length
        return slice(cache.length, end), end
    if isinstance(cache.length, int):
        cache.length = zero_length(device)
    return cache.length + torch.arange(length, device=device), cache.capacity


# ------------------------------------------------------------------------------------ padding


def real_tokens(
    attention_mask: Tensor | None, batch: int, length: int, width: int, cache: Cache | None
) -> Tensor | None:
    """attention_mask as bool [B, width], or None when nothing is padding.

    Raises ValueError when the mask has another shape, or is missing though the cache needs it.
    """
    expected = (batch, width)
    if attention_mask is None:
        if cache is not None and cache.padded:
            raise ValueError(
                f"The cache holds padding, but attention_mask is missing: give one of {expected}."
            )
        return None
    if attention_mask.shape != expected:
        meaning = f"{width - length} tokens in the cache and {length} new ones"
        if cache is not None and cache.capacity is not None:
            meaning = f"{width} tokens that the static cache has room for, 1 for those to come"
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected {expected}: one "
            f"value for each of {meaning}."
        )
    real = attention_mask.bool()
    # waits for the device, as choosing the next token does; no compiled graph can
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    if cache is not None:
        cache.padded = True
    return real


def real_positions(real: Tensor, slots: slice | Tensor) -> Tensor:
    """Positions [B, L] of the tokens at `slots` of real [B, S + L]; padding does not count."""
    return (real.long().cumsum(-1) - 1).clamp(min=0)[:, slots]


# ------------------------------------------------------------------------------------ layers


class RMSNorm(nn.Module):
    """u / √(mean(u²) + eps) ⊙ w, the norm in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, u: Tensor) -> Tensor:
        wide = u.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(u.dtype) * self.weight


class Residual(nn.Module):
    """r ⊙ h + update."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, h: Tensor, update: Tensor) -> Tensor:
        return self.weight * h + update


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """SDPA by its other kernels, unless training.

    cuDNN makes a plan for each new length: 67 ms for every token that is generated, on an H200.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # which cannot trace the switch
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Products of states stay float32, as in training: autocast would round their factors."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def seen_keys(
    slots: slice | Tensor, width: int, real: Tensor | None, device: torch.device
) -> Tensor:
    """Mask of attention, [L, width] or [B, 1, L, width]: queries at `slots` see keys up to them."""
    keys = torch.arange(width, device=device)
    own = keys[slots][:, None]
    mask = keys <= own
    if real is not None:
        # a padded query must see something, or its softmax is NaN: every query sees itself
        mask = mask & (real[:, None, None] | (keys == own))
    return mask


class Attention(nn.Module):
    """Causal attention with grouped queries and rotated Q, K."""

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, width)
        self.k_proj = linear(config.hidden_size, kv_width)
        self.v_proj = linear(config.hidden_size, kv_width)
        self.o_proj = linear(width, config.hidden_size)

    def forward(
        self,
        u: Tensor,
        angles: Angles | None,
        cache: KVCache | StaticKVCache | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """mask: the keys that queries see, [.., L, S]; None: all up to their own token."""
        batch, length, _ = u.shape
        # [B, L, heads · head_dim] -> [B, L, heads, head_dim], rotated -> [B, heads, L, head_dim]
        heads = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(u).view(heads), angles).transpose(1, 2)
        k = rotate(self.k_proj(u).view(heads), angles).transpose(1, 2)
        v = self.v_proj(u).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        with without_cudnn():
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and length > 1, enable_gqa=True
            )
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class SSD(nn.Module):
    """The state-space mixer: S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t b_tᵀ, y_t = S_t c_t (+ D x_t)."""

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__()
        self.config = config
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.widths = [heads * config.head_dim] + [config.ssd_groups * config.state_dim] * 2
        self.x_proj, self.b_proj, self.c_proj = (linear(hidden, w) for w in self.widths)
        self.dt_proj = linear(hidden, heads)
        self.out_proj = linear(self.widths[0], hidden)
        # float32 where transformers builds a model of another default dtype, too
        self.A_log = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.D: nn.Parameter | None = None
        if config.ssd_skip:
            self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.conv: nn.Conv1d | None = None
        if width := config.ssd_conv_width:
            channels = sum(self.widths)
            self.conv = nn.Conv1d(channels, channels, width, groups=channels, bias=False)

    def forward(
        self, u: Tensor, angles: Angles | None, cache: SSDCache | None, real: Tensor | None = None
    ) -> Tensor:
        """real: of these tokens, [B, L]."""
        batch, length, _ = u.shape
        config = self.config
        x, b, c, dt = self.x_proj(u), self.b_proj(u), self.c_proj(u), self.dt_proj(u)
        padding = None if real is None else ~real[..., None]  # [B, L, 1]
        if padding is not None:
            dt = dt.masked_fill(padding, NO_STEP)
        if self.conv is not None:
            xbc = torch.cat([x, b, c], dim=-1)
            if padding is not None:  # zeros, as there are before a sequence
                xbc = xbc.masked_fill(padding, 0)
            x, b, c = self._convolve(xbc, self.conv, cache)
        x = x.reshape(batch, length, -1, config.head_dim)  # [B, L, H, P]
        b = b.reshape(batch, length, -1, config.state_dim)  # [B, L, G, N]
        c = c.reshape(batch, length, -1, config.state_dim)
        with without_autocast(u.device.type):
            y, state = self._scan(x, dt, b, c, angles, cache.state if cache else None)
        if cache is not None:
            cache.keep("state", state)
        return self.out_proj(y.reshape(batch, length, -1))

    def _convolve(self, xbc: Tensor, conv: nn.Conv1d, cache: SSDCache | None) -> tuple[Tensor, ...]:
        """silu of the causal depthwise convolution of xbc [B, L, channels], split again."""
        xbc = xbc.transpose(1, 2)  # [B, channels, L]
        batch, channels, length = xbc.shape
        tail = cache.conv_tail if cache is not None else None
        if tail is None:
            tail = xbc.new_zeros(batch, channels, self.config.ssd_conv_width - 1)
        xbc = torch.cat([tail, xbc], dim=-1)
        if cache is not None:
            # a view would keep the whole prompt
            cache.keep("conv_tail", xbc[..., length:].clone())
        return F.silu(conv(xbc)).transpose(1, 2).split(self.widths, dim=-1)

    def _scan(
        self,
        x: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        angles: Angles | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """y [B, L, H, P] in x's dtype and the state after the last token."""
        if self.A_log.dtype != torch.float32 and not torch.compiler.is_compiling():
            warnings.warn(ROUNDED.format(dtype=self.A_log.dtype), stacklevel=2)
        batch, length, heads, width = x.shape
        A, dt_bias = -self.A_log.float().exp(), self.dt_bias.float()
        D = None if self.D is None else self.D.float()
        # torch.compile cannot trace every path of the kernels, but every operation of this file
        fast = kernels_ssd() if length > 1 and not torch.compiler.is_compiling() else None
        if fast is not None:
            x, dt, b, c = (t.contiguous() for t in (x, dt, b, c))
            cos = sin = None
            if angles is not None:
                cos, sin = (t.expand(batch, -1, -1).contiguous() for t in (angles.cos, angles.sin))
            starts = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * length
            y, state = fast(
                x, dt, A, b, c, cos=cos, sin=sin, dt_bias=dt_bias, cu_seqlens=starts,
                chunk_size=self.config.ssd_chunk_size, initial_state=state,
                output_final_state=True, D=D,
            )  # fmt: skip
            return y, state
        dt = F.softplus(dt.float() + dt_bias)
        b, c = rotate(b, angles), rotate(c, angles)
        if state is None:
            state = x.new_zeros(batch, heads, width, b.shape[-1], dtype=torch.float32)
        if length == 1:
            y, state = single_step(x, dt, A, b, c, state)
        else:
            chunk = self.config.ssd_chunk_size or FALLBACK_CHUNK
            scan = batched_scan if torch.compiler.is_compiling() else chunked_scan
            y, state = scan(x, dt, A, b, c, state, chunk)
        if D is not None:
            y = y + D[:, None] * x.float()
        return y.to(x.dtype), state


class FeedForward(nn.Module):
    """SwiGLU: W_down(silu(W_gate u) ⊙ W_up u)."""

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))


class Layer(nn.Module):
    """A mixer and a feed-forward, each with its norm before and its residual after.

    With gradient_checkpointing the layer is computed again in backward, so that a training step
    without a cache keeps its input alone.
    """

    gradient_checkpointing = False
    # transformers sets both, this one to a function of its choice
    _gradient_checkpointing_func = staticmethod(
        functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    )

    def __init__(self, config: TransXSSMConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.is_attention = config.is_attention(index)
        self.pre_sequence_layernorm = RMSNorm(size, eps)
        if self.is_attention:
            self.attn = Attention(config)
        else:
            self.ssd = SSD(config)
        self.post_sequence_residual = Residual(size)
        self.pre_state_layernorm = RMSNorm(size, eps)
        self.feed_forward = FeedForward(config)
        self.post_state_residual = Residual(size)

    def forward(
        self,
        h: Tensor,
        angles: Angles | None,
        cache: SSDCache | KVCache | StaticKVCache | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """h [B, L, hidden] after the layer. mask: as its mixer takes it."""
        if self.gradient_checkpointing and cache is None and torch.is_grad_enabled():
            again: Tensor = self._gradient_checkpointing_func(self._run, h, angles, None, mask)
            return again
        return self._run(h, angles, cache, mask)

    def _run(
        self,
        h: Tensor,
        angles: Angles | None,
        cache: SSDCache | KVCache | StaticKVCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        mixer = self.attn if self.is_attention else self.ssd
        update = mixer(self.pre_sequence_layernorm(h), angles, cache, mask)
        h = self.post_sequence_residual(h, update)
        return self.post_state_residual(h, self.feed_forward(self.pre_state_layernorm(h)))


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.attends = [layer.is_attention for layer in self.layers]
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_table = RotaryTable(config, config.head_dim)
        self.ssd_table = RotaryTable(config, config.state_dim)

    def forward(
        self,
        token_ids: Tensor | None,
        cache: Cache | None = None,
        *,
        position_offset: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        each: list[Tensor] | None = None,
    ) -> Tensor:
        """Normalised hidden states [B, L, hidden] of token_ids [B, L], one sequence a row.

        With a cache the tokens continue what it remembers, and it is updated. position_offset is
        the position of the first token; by default the number of tokens in the cache.
        attention_mask [B, cached + L] is 0 for padding: real tokens do not see it, and positions
        count them alone, so that a row padded on the left gives what it gives by itself. What
        comes out at padding means nothing. With a static cache it is [B, capacity], 1 for tokens
        to come. inputs_embeds [B, L, hidden] take the place of token_ids' embeddings. each: gets
        what goes into every layer, [B, L, hidden].
        """
        h = self.word_embed(token_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = h.shape
        slots, width = new_slots(cache, length, h.device)
        real = real_tokens(attention_mask, batch, length, width, cache)
        if real is not None and position_offset is not None:
            raise ValueError("position_offset and padding in attention_mask exclude each other.")
        seen = None
        if real is not None or isinstance(slots, Tensor) or width > length > 1:
            seen = seen_keys(slots, width, real, h.device) if any(self.attends) else None
        positions, end = slots, width
        if position_offset is not None:
            end = position_offset + length
            positions = slice(position_offset, end)
        elif real is not None:
            positions, real = real_positions(real, slots), real[:, slots]
        rope = self.config.rope
        attn_angles = ssd_angles = None
        if rope != "none":
            attn_angles = self.attn_table.at(positions, end, h.device)
        if rope == "unified":
            ssd_angles = self.ssd_table.at(positions, end, h.device)
        for i, layer in enumerate(self.layers):
            if each is not None:
                each.append(h)
            angles, mask = (attn_angles, seen) if self.attends[i] else (ssd_angles, real)
            h = layer(h, angles, cache.layers[i] if cache is not None else None, mask)
        if cache is not None:
            cache.length += length
        return self.final_layernorm(h)


class TransXSSM(nn.Module):
    """The whole model; parameter names are those of its safetensors files."""

    def __init__(self, config: TransXSSMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        token_ids: Tensor,
        cache: Cache | None = None,
        *,
        position_offset: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 [B, L, vocab] of token_ids [B, L]; see `Backbone.forward`."""
        hidden = self.hidden(
            token_ids, cache, position_offset=position_offset, attention_mask=attention_mask
        )
        return self.logits(hidden)

    def hidden(
        self,
        token_ids: Tensor,
        cache: Cache | None = None,
        *,
        position_offset: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: normalised hidden states [B, L, hidden]."""
        hidden: Tensor = self.model(
            token_ids, cache, position_offset=position_offset, attention_mask=attention_mask
        )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 of hidden states: apart, so that a prompt needs only its last row."""
        if self.lm_head is None:
            return F.linear(hidden, self.model.word_embed.weight).float()
        logits: Tensor = self.lm_head(hidden)  # a call, for what is hooked to the module
        return logits.float()

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialise as training does: the same distributions, not the same numbers."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            p.copy_(initial_value(name, p.shape, self.config, rng))


def initial_value(
    name: str, shape: torch.Size, config: TransXSSMConfig, rng: torch.Generator | None
) -> Tensor:
    """A fresh value, float32 on the CPU, of the parameter that has this name."""
    uniform = torch.rand(shape, generator=rng, dtype=torch.float32, device="cpu")
    if name.endswith("A_log"):
        return (1 + 15 * uniform).log()
    if name.endswith("dt_bias"):
        step = torch.exp(math.log(1e-3) + uniform * math.log(100))
        return step + torch.log(-torch.expm1(-step))  # softplus⁻¹
    if name.endswith("conv.weight"):
        return (2 * uniform - 1) / math.sqrt(shape[-1])
    if len(shape) == 1:
        return torch.ones_like(uniform)
    value = 0.02 * torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu")
    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
        value /= math.sqrt(2 * config.num_hidden_layers)
    return value
