"""The whole model in float64, one token and one head at a time, from DESIGN.md section 1.

    h ← r₁ ⊙ h + Mixer(RMSNorm(h))        h ← r₂ ⊙ h + SwiGLU(RMSNorm(h))

Slow and plain on purpose: numpy only, nothing shared with the models it judges. Takes tensors by
their single-GPU names, the fields of config.json, and the lengths of the documents packed in a row.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def model_logits(
    tensors: dict[str, Any],
    config: dict[str, Any],
    token_ids: list[int],
    document_lengths: list[int] | None = None,
) -> Array:
    """Logits [L, vocab] of one row that packs documents of the given lengths (default: one)."""
    lengths = document_lengths or [len(token_ids)]
    assert sum(lengths) == len(token_ids)
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in tensors.items()}
    logits, start = [], 0
    for length in lengths:  # a document knows nothing of its neighbours
        logits.append(document_logits(weights, config, token_ids[start : start + length]))
        start += length
    return np.concatenate(logits)


def document_logits(weights: dict[str, Array], config: dict[str, Any], ids: list[int]) -> Array:
    embedding = weights["model.word_embed.weight"]
    eps = config["rms_norm_eps"]
    h = embedding[ids]  # [L, hidden]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
        is_attention = i % config["attn_layer_period"] == config["attn_layer_offset"]
        mixer = attention if is_attention else ssd
        mixed = mixer(layer, config, rms_norm(h, layer["pre_sequence_layernorm.weight"], eps))
        h = layer["post_sequence_residual.weight"] * h + mixed
        fed = swiglu(layer, rms_norm(h, layer["pre_state_layernorm.weight"], eps))
        h = layer["post_state_residual.weight"] * h + fed
    h = rms_norm(h, weights["model.final_layernorm.weight"], eps)
    head = embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
    return h @ head.T


def rms_norm(u: Array, weight: Array, eps: float) -> Array:
    return u / np.sqrt((u**2).mean(axis=-1, keepdims=True) + eps) * weight


def silu(u: Array) -> Array:
    return u / (1 + np.exp(-u))


def swiglu(layer: dict[str, Array], u: Array) -> Array:
    gate = silu(u @ layer["feed_forward.gate_proj.weight"].T)
    return (gate * (u @ layer["feed_forward.up_proj.weight"].T)) @ layer[
        "feed_forward.down_proj.weight"
    ].T


def attention(layer: dict[str, Array], config: dict[str, Any], u: Array) -> Array:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, length = config["head_dim"], len(u)
    q = (u @ layer["attn.q_proj.weight"].T).reshape(length, heads, dim)
    k = (u @ layer["attn.k_proj.weight"].T).reshape(length, kv_heads, dim)
    v = (u @ layer["attn.v_proj.weight"].T).reshape(length, kv_heads, dim)
    if config["rope"] != "none":
        q, k = rope(q, config), rope(k, config)
    y = np.zeros((length, heads, dim))
    for head in range(heads):
        kv = head // (heads // kv_heads)
        for t in range(length):
            scores = k[: t + 1, kv] @ q[t, head] / math.sqrt(dim)
            weights = np.exp(scores - scores.max())
            y[t, head] = weights / weights.sum() @ v[: t + 1, kv]
    return y.reshape(length, heads * dim) @ layer["attn.o_proj.weight"].T


def ssd(layer: dict[str, Array], config: dict[str, Any], u: Array) -> Array:
    heads, groups = config["num_attention_heads"], config["ssd_groups"]
    width, state_dim, length = config["head_dim"], config["state_dim"], len(u)
    x = u @ layer["ssd.x_proj.weight"].T
    b = u @ layer["ssd.b_proj.weight"].T
    c = u @ layer["ssd.c_proj.weight"].T
    if config.get("ssd_conv_width"):
        mixed = convolution(np.concatenate([x, b, c], axis=1), layer["ssd.conv.weight"])
        x, b, c = np.split(mixed, [x.shape[1], x.shape[1] + b.shape[1]], axis=1)
    x = x.reshape(length, heads, width)
    b = b.reshape(length, groups, state_dim)
    c = c.reshape(length, groups, state_dim)
    if config["rope"] == "unified":
        b, c = rope(b, config), rope(c, config)
    delta = np.log1p(np.exp(u @ layer["ssd.dt_proj.weight"].T + layer["ssd.dt_bias"]))  # [L, H]
    A = -np.exp(layer["ssd.A_log"])
    y = np.zeros((length, heads, width))
    for head in range(heads):
        group = head // (heads // groups)
        S = np.zeros((width, state_dim))
        for t in range(length):
            step = delta[t, head]
            S = np.exp(step * A[head]) * S + step * np.outer(x[t, head], b[t, group])
            y[t, head] = S @ c[t, group]
            if config.get("ssd_skip"):
                y[t, head] += layer["ssd.D"][head] * x[t, head]
    return y.reshape(length, heads * width) @ layer["ssd.out_proj.weight"].T


def convolution(u: Array, weight: Array) -> Array:
    """silu(Σ_j w[c, j] u[t - (width-1) + j, c]): the last tap sees the present token."""
    length, channels = u.shape
    width = weight.shape[-1]
    y = np.zeros((length, channels))
    for t in range(length):
        for j in range(width):
            source = t - (width - 1) + j
            if source >= 0:
                y[t] += weight[:, 0, j] * u[source]
    return silu(y)


def rope(z: Array, config: dict[str, Any]) -> Array:
    """Rotate the pairs (k, k + dim/2) of z [L, heads, dim] by position · frequency_k."""
    length, _, dim = z.shape
    half = dim // 2
    out = np.zeros_like(z)
    for k in range(half):
        frequency, magnitude = rope_frequency(k, dim, config)
        for t in range(length):
            cos, sin = math.cos(t * frequency) * magnitude, math.sin(t * frequency) * magnitude
            out[t, :, k] = z[t, :, k] * cos - z[t, :, k + half] * sin
            out[t, :, k + half] = z[t, :, k + half] * cos + z[t, :, k] * sin
    return out


def rope_frequency(k: int, dim: int, config: dict[str, Any]) -> tuple[float, float]:
    """Angular frequency of pair k and the factor on cos and sin, as Hugging Face defines them."""
    theta = config["rope_theta"]
    plain = theta ** (-2 * k / dim)
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    kind = scaling["rope_type"]
    if kind == "default":
        return plain, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if kind == "llama3":
        wavelength = 2 * math.pi / plain
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if wavelength < original / high:
            return plain, 1.0
        if wavelength > original / low:
            return plain / factor, 1.0
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * plain / factor + smooth * plain, 1.0
    assert kind == "yarn"

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction(scaling.get("beta_slow", 1))), dim - 1)
    ramp = min(max((k - low) / (high - low if high != low else 0.001), 0.0), 1.0)
    magnitude = scaling.get("attention_factor", 0.1 * math.log(factor) + 1.0)
    return plain / factor * ramp + plain * (1 - ramp), magnitude
