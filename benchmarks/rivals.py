"""TransXSSM and what it is compared with: the same code, other switches, as many parameters."""

from dataclasses import dataclass

from parallel.config import ModelConfig

TOLERANCE = 0.01  # of the parameters
STEP = 8  # of intermediate_size


@dataclass(frozen=True)
class Rival:
    """Which layers attend (all, none, or as the model has them), and where positions come from."""

    name: str
    layers: str
    rope: str
    conv_width: int = 0


TRANSXSSM = Rival("TransXSSM", "hybrid", "unified")
ATTENTION = Rival("attention (Llama)", "attention", "unified")
RIVALS = (
    TRANSXSSM,
    ATTENTION,
    Rival("SSD, RoPE", "ssd", "unified"),
    Rival("hybrid, RoPE in attention", "hybrid", "attention_only"),
    Rival("hybrid, convolution (Jamba)", "hybrid", "none", conv_width=4),
)
DECAY_ALONE = Rival("hybrid, decay alone", "hybrid", "none")


def rival_model(rival: Rival, model: ModelConfig) -> ModelConfig:
    """`model`, a hybrid, as the rival, its feed-forwards as wide as gives it as many parameters.

    Raises ValueError where that is not possible within TOLERANCE.
    """
    period = model.attn_layer_period
    layers = {
        "hybrid": {},
        "attention": {"attn_layer_period": 1, "attn_layer_offset": 0},
        "ssd": {"attn_layer_offset": period},
    }[rival.layers]
    fields = layers | {"rope": rival.rope, "ssd_conv_width": rival.conv_width}
    found = ModelConfig.model_validate(model.model_dump() | fields)
    wanted = model.num_params()["total"]
    missing = wanted - found.num_params()["total"]
    columns = missing / (3 * model.hidden_size * model.num_layers)
    width = model.intermediate_size + round(columns / STEP) * STEP
    if width < STEP:
        raise ValueError(f"{rival.name}: no feed-forward is left of it at {wanted:,} parameters")
    found = ModelConfig.model_validate(found.model_dump() | {"intermediate_size": width})
    off = found.num_params()["total"] / wanted - 1
    if abs(off) > TOLERANCE:
        raise ValueError(f"{rival.name}: {off:+.1%} parameters with intermediate_size={width}")
    return found
