"""A tiny single-GPU model, for tests."""

from typing import Any

import torch

from checkpoints_tools.single_gpu import TransXSSM, TransXSSMConfig

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "state_dim": 8,
    "ssd_groups": 2,
    "ssd_chunk_size": 16,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "rope_theta": 100.0,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "ungrouped": {"num_key_value_heads": 4, "ssd_groups": 4},
    "one-group": {"num_key_value_heads": 1, "ssd_groups": 1},
    "P8-N12": {"state_dim": 12},
    "P8-N4": {"state_dim": 4},
    "attention-only-rope": {"rope": "attention_only"},
    "no-rope": {"rope": "none"},
    "skip": {"ssd_skip": True},
    "conv4": {"ssd_conv_width": 4},
    "conv1": {"ssd_conv_width": 1},
    "rival": {"ssd_conv_width": 4, "ssd_skip": True, "rope": "none", "state_dim": 12},
    "untied": {"tie_word_embeddings": False},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn-N12": {"rope_scaling": {**YARN, "attention_factor": 1.3}, "state_dim": 12},
    "llama3": {"rope_scaling": LLAMA3},
    "no-attention": {"attn_layer_offset": 7},
    "attention-alone": {"attn_layer_period": 1, "attn_layer_offset": 0},
}


def make_model(seed: int = 0, **changes: Any) -> TransXSSM:
    """A tiny model whose every parameter matters: larger weights, scattered norms and residuals."""
    model = TransXSSM(TransXSSMConfig(**{**TINY, **changes}))
    model.reset_parameters(seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "conv" not in name:
                p.mul_(8)
            elif name.endswith("dt_bias"):
                p.add_(2)
            else:
                p.add_(0.2 * torch.randn(p.shape, generator=rng))
    return model.eval()


def make_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(TINY["vocab_size"], (batch, length), generator=rng)


def pad_left(rows: list[torch.Tensor], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one batch, and its attention_mask."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return tokens, mask
