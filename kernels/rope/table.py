"""RoPE frequencies and the cos/sin table that attention and SSD share.

    angle[t, k] = position[t] · f_k          f_k = theta^(-2k/dim),  k = 0 .. dim/2-1
    cos[t, k] = m · cos(angle[t, k])         sin[t, k] = m · sin(angle[t, k])

`scaling` changes the frequencies f (and, for YaRN, the factor m), with the keys and the meaning of
`rope_scaling` in Hugging Face configs:

    {}       f_k unchanged, m = 1
    linear   f_k / factor
    yarn     f_k where a pair turns often over the original context, f_k / factor where it turns
             seldom, a linear ramp over k between; m = 0.1·ln(factor) + 1 unless given
    llama3   f_k where the wavelength is short, f_k / factor where it is long, blended between

Angles are built in float64: at position 100,000 a float32 product is already wrong by 0.004 rad.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Frequencies = tuple[Tensor, float]


def rotary_cos_sin(
    position_ids: Tensor, dim: int, theta: float, scaling: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [..., dim/2] at `position_ids` int64 [...], on the same device."""
    inv_freq, attention_factor = inverse_frequencies(dim, theta, scaling)
    angles = position_ids.unsqueeze(-1).double() * inv_freq.to(position_ids.device)
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any]) -> Frequencies:
    """f float64 [dim/2] (CPU) and the factor m that multiplies cos and sin."""
    if dim <= 0 or dim % 2:
        raise ValueError(f"RoPE dim={dim} must be even and positive: it rotates pairs (k, k+dim/2)")
    if theta <= 1:
        raise ValueError(f"rope_theta={theta} must be greater than 1")
    rope_type = scaling.get("rope_type", scaling.get("type", "default" if not scaling else None))
    if rope_type not in _SCALINGS:
        reason = (
            ": dynamic NTK changes the frequencies with the longest document of a batch, so a"
            " packed document would turn with its neighbours, and under context parallelism no"
            " rank sees that length"
            if rope_type == "dynamic"
            else ""
        )
        raise ValueError(
            f"rope_scaling.rope_type={rope_type!r} is not offered{reason};"
            f" use one of {', '.join(_SCALINGS)} (or an empty rope_scaling)"
        )
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return _SCALINGS[rope_type](plain, dim, theta, scaling)


def _default(plain: Tensor, dim: int, theta: float, scaling: Mapping[str, Any]) -> Frequencies:
    return plain, 1.0


def _linear(plain: Tensor, dim: int, theta: float, scaling: Mapping[str, Any]) -> Frequencies:
    return plain / _number(scaling, "factor"), 1.0


def _yarn(plain: Tensor, dim: int, theta: float, scaling: Mapping[str, Any]) -> Frequencies:
    factor = _number(scaling, "factor")
    context = _number(scaling, "original_max_position_embeddings")

    def pair_turning(rotations: float) -> float:
        """The (fractional) k whose pair turns `rotations` times over the original context."""
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_turning(scaling.get("beta_fast") or 32)
    high = pair_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # the reference's guard against 0/0
    k = torch.arange(dim // 2, dtype=torch.float64)
    stretched = ((k - low) / width).clamp(0, 1)  # 0: keep f, 1: divide by factor
    return plain * (1 - stretched) + plain / factor * stretched, _yarn_magnitude(factor, scaling)


def _yarn_magnitude(factor: float, scaling: Mapping[str, Any]) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return magnitude(over) / magnitude(under) if over and under else magnitude(1.0)


def _llama3(plain: Tensor, dim: int, theta: float, scaling: Mapping[str, Any]) -> Frequencies:
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if high <= low:
        raise ValueError(
            f"rope_scaling.high_freq_factor={high} must exceed rope_scaling.low_freq_factor={low}"
        )
    turns = _number(scaling, "original_max_position_embeddings") * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: keep f, 0: divide by factor
    return plain * kept + plain / factor * (1 - kept), 1.0


def _number(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"rope_scaling.{key}={value!r} must be given as a positive number")
    return float(value)


_SCALINGS: dict[str, Callable[[Tensor, int, float, Mapping[str, Any]], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
}
