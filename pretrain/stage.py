"""The configured model's stage of this rank, and its optimizer."""

import torch

from parallel.build import DTYPES, BuiltStage, build_stage
from parallel.zero import ZeroOptimizer
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


def configured_optimizer(config: Config, device: torch.device) -> ZeroOptimizer:
    """Build the stage and its sharded optimizer. Collective."""
    optimizer = config.optimizer
    return ZeroOptimizer(
        configured_stage(config, device),
        config.parallel,
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_grad_norm=optimizer.clip_grad_norm,
    )
