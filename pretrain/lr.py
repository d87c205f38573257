"""Learning-rate schedules, in tokens."""

import math

from pretrain.sections import OptimizerConfig


def learning_rate(config: OptimizerConfig, tokens: int, total_tokens: int) -> float:
    """Rate of the update that brings the run to `tokens` tokens of `total_tokens`.

    Linear warm-up over warmup_fraction of the tokens to the peak; then cosine to min_lr_ratio of
    the peak at the end, or (wsd) the peak until the last decay_fraction and a linear descent to
    min_lr_ratio of it.
    """
    progress = min(1.0, tokens / total_tokens)
    if progress < config.warmup_fraction:
        return config.lr * progress / config.warmup_fraction
    low = config.min_lr_ratio
    if config.schedule == "cosine":
        after = (progress - config.warmup_fraction) / (1 - config.warmup_fraction)
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * after)))
    decay = max(0.0, 1 - (1 - progress) / config.decay_fraction)
    return config.lr * (low + (1 - low) * (1 - decay))
