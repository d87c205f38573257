"""One rank of a training job: joins the others, opens data, finds where to begin, and trains."""

import logging
import os
import time
from pathlib import Path

import torch

from parallel import self_check
from parallel.build import DTYPES
from parallel.compat import prepare_host
from parallel.groups import destroy_groups, from_rank_0, init_distributed, init_groups
from parallel.launch import Launch
from parallel.topology import topology
from pretrain import stop
from pretrain.config import Config, ConfigError
from pretrain.data import warn_of_cache, warn_of_epochs
from pretrain.lost_checkpoints import record_saves
from pretrain.memory import refuse_too_large
from pretrain.resume import find_start, load_weights
from pretrain.run_dir import record_start, start_log
from pretrain.sources import keep_tokenizer, open_data
from pretrain.trackers import check_trackers
from pretrain.trainer import Trainer
from pretrain.watchdog import Watchdog

log = logging.getLogger("transxssm")


def train(config: Config, launch: Launch) -> str | None:
    """Run, or go on with, the training that `config` describes, as one rank of the job.

    Returns why it stopped before its end, with everything saved, or None at its end. Raises
    ConfigError, DataError or CheckpointError before a model is built where it can.
    """
    started = time.time()
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        torch.use_deterministic_algorithms(True)
    device = prepare_host(launch.local_rank)
    init_distributed(launch, device)
    refuse_too_large(config, launch, device)
    run_dir = Path(config.logging.run_dir)
    start_log(run_dir, launch.rank)
    timeout = config.training.hang_timeout
    with Watchdog(launch, timeout, run_dir / "logs", started) as watchdog:
        reason = _train(config, launch, device, watchdog)
    destroy_groups()
    return reason


def _train(config: Config, launch: Launch, device: torch.device, watchdog: Watchdog) -> str | None:
    init_groups(config.parallel)
    check_trackers(config)
    from_rank_0(lambda: _watch_time_left(config.training.stop_before_limit))
    data, validation = open_data(config)
    start = find_start(config, data)
    from_rank_0(lambda: record_start(config, launch.world_size))
    from_rank_0(lambda: record_saves(config))
    from_rank_0(lambda: keep_tokenizer(data, Path(config.logging.run_dir)))
    watchdog.at("checking kernels")
    self_check.prove(config.model, device, DTYPES[config.training.dtype])
    watchdog.at("building the model")
    trainer = Trainer(config, data, validation, device, watchdog.at)
    _tell_of_layout(config, launch, device)
    if launch.rank == 0:
        warn_of_epochs(config, data)
        warn_of_cache(config, data)
    if start is not None:
        watchdog.at(f"loading {start}")
        trainer.resume(start)
        log.info("resumed from %s", start)
    elif config.checkpoint.load_weights_only:
        load_weights(config, data, trainer.zero)
        log.info("beginning with the weights of %s", config.checkpoint.load_weights_only)
    stop.outlive_signals()
    return trainer.run()


def _watch_time_left(margin: float) -> None:
    """Of rank 0. Raises ConfigError when the job has too little time to begin."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id or not margin:
        return
    left = stop.watch_time_left(job_id, margin)
    if left is not None and left < margin:
        raise ConfigError(
            f"training.stop_before_limit={margin:g} s is more than the {left:.0f} s that job "
            f"{job_id} has left; give it a longer --time, or lower training.stop_before_limit"
        )


def _tell_of_layout(config: Config, launch: Launch, device: torch.device) -> None:
    parallel, data_parallel = config.parallel, config.data_parallel(launch.world_size)
    log.info(
        "%s parameters, %d ranks: tensor %d × context %d × data %d × pipeline %d, ZeRO %d, %s, %s",
        f"{config.model.num_params()['total']:,}",
        launch.world_size,
        parallel.tensor,
        parallel.context,
        data_parallel,
        parallel.pipeline,
        parallel.zero_stage,
        config.training.dtype,
        device.type,
    )
    top = topology(parallel, data_parallel, launch.ranks_per_node or launch.world_size)
    if launch.rank == 0 and (reach := top.nodes_of_a_group("tensor")) > 1:
        log.warning(
            "parallel.tensor=%d reaches over %d nodes of %d ranks: every layer waits for the "
            "network; use a parallel.tensor that divides %d",
            *(parallel.tensor, reach, launch.ranks_per_node, launch.ranks_per_node),
        )
