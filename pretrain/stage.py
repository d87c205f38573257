"""The configured model's stage of this rank."""

import torch

from parallel.build import DTYPES, BuiltStage, build_stage
from pretrain.config import Config


def configured_stage(config: Config, device: torch.device) -> BuiltStage:
    """With its initial weights, on `device`. Groups must exist."""
    return build_stage(
        config.model,
        config.parallel,
        seq_len=max(config.seq_lens),
        dtype=DTYPES[config.training.dtype],
        seed=config.training.seed,
        deterministic=config.training.deterministic,
        device=device,
        z_loss=config.training.z_loss,
    )
