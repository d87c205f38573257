"""A trainer as the command makes it, for programs that make its steps themselves."""

from pathlib import Path
from typing import Any

from pretrain.config import Config


def open_trainer(config: Config) -> Any:
    """This rank's Trainer of a new run, its job and groups joined, its run directory made."""
    from parallel.compat import prepare_host
    from parallel.groups import from_rank_0, init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from pretrain.sources import keep_tokenizer, open_data
    from pretrain.trainer import Trainer

    device = prepare_host()
    init_distributed(launch_from_environment(), device)
    init_groups(config.parallel)
    data, validation = open_data(config)
    run_dir = Path(config.logging.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    from_rank_0(lambda: keep_tokenizer(data, run_dir))
    return Trainer(config, data, validation, device)
