"""One rank of a training job: joins the others, opens data, finds where to begin, and trains."""

import logging
import os
import time
from pathlib import Path

import torch

from checkpoints_tools.manifest import read_manifest
from parallel import self_check
from parallel.attention_choice import choose_attention
from parallel.build import DTYPES
from parallel.compat import prepare_host
from parallel.groups import destroy_groups, from_rank_0, init_distributed, init_groups
from parallel.launch import Launch
from parallel.topology import topology
from pretrain import run_lock, stop
from pretrain.config import Config, ConfigError
from pretrain.data import warn_of_cache, warn_of_epochs
from pretrain.lost_checkpoints import record_saves
from pretrain.memory import refuse_too_large
from pretrain.model_check import model_warnings
from pretrain.resume import find_start, load_weights
from pretrain.run_dir import begin_log, lock_run, record_start, start_log
from pretrain.sources import blend, keep_tokenizer, open_data
from pretrain.starts import record_ended
from pretrain.trackers import check_trackers
from pretrain.trainer import Trainer, refuse_without_loss
from pretrain.watchdog import Watchdog
from untrusted.numbers import counted, number

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
    from_rank_0(lambda: lock_run(run_dir))
    try:
        start_log(run_dir, launch.rank)
        timeout = config.training.hang_timeout
        with Watchdog(launch, timeout, run_dir / "logs", started) as watchdog:
            reason = _train(config, launch, device, watchdog)
    finally:
        run_lock.release()
    destroy_groups()
    return reason


def _train(config: Config, launch: Launch, device: torch.device, watchdog: Watchdog) -> str | None:
    init_groups(config.parallel)
    check_trackers(config)
    from_rank_0(lambda: _watch_time_left(config.training.stop_before_limit))
    data, validation = open_data(config)
    start = find_start(config, data)
    if start is not None and start.has_ended:
        from_rank_0(lambda: _refuse_without_loss(start.folder, Path(config.logging.run_dir)))
        log.info("nothing to do: %s is the end of the run", start.folder)
        return None
    begin_log()
    first_step = 0 if start is None else int(start.folder.name.removeprefix("step-"))
    continued = config if start is None else config.with_phases(start.phases)
    from_rank_0(lambda: record_start(config, launch.world_size, first_step, continued))
    from_rank_0(lambda: record_saves(config))
    from_rank_0(lambda: keep_tokenizer(data, Path(config.logging.run_dir)))
    watchdog.at("checking kernels")
    choose_attention(config.model, device, DTYPES[config.training.dtype])
    self_check.prove(config.model, device, DTYPES[config.training.dtype])
    watchdog.at("building the model")
    if start is not None:
        data = blend(data.sources, continued)
    trainer = Trainer(continued, data, validation, device, watchdog.at)
    _tell_of_layout(config, launch, device)
    if launch.rank == 0:
        for warning in model_warnings(config.model, data.meta.vocab_size):
            log.warning("%s", warning)
        warn_of_epochs(continued, data)
        warn_of_cache(config, data)
    if start is not None:
        watchdog.at(f"loading {start.folder}")
        trainer.resume(start.folder)
        log.info("resumed from %s", start.folder)
        if start.changes:
            trainer.record("settings changed", start.changes)
    elif config.checkpoint.load_weights_only:
        load_weights(config, data, trainer.zero)
        log.info("beginning with the weights of %s", config.checkpoint.load_weights_only)
    stop.outlive_signals()
    reason = trainer.run()
    if reason is None:
        message = f"step {trainer.step:,} of {continued.total_steps:,}"
        record_ended("done", message, step=trainer.step)
    else:
        record_ended("stopped", f"{reason}, all saved", step=trainer.step)
    return reason


def _refuse_without_loss(folder: Path, run_dir: Path) -> None:
    """Refuse to call a run finished that has learned nothing. Rank 0 only."""
    manifest = read_manifest(folder)
    if "judge" in manifest:  # older checkpoints have none
        refuse_without_loss(manifest["judge"]["losses"], manifest["step"], run_dir)


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
        "%s parameters, %s: tensor %d × context %d × data %d × pipeline %d, ZeRO %d, %s, %s",
        number(config.model.num_params()["total"]),
        counted(launch.world_size, "rank"),
        parallel.tensor,
        parallel.context,
        data_parallel,
        parallel.pipeline,
        parallel.zero_stage,
        config.training.dtype,
        device.type,
    )
    top = topology(parallel, data_parallel, launch.ranks_per_node or launch.world_size)
    per_node = launch.ranks_per_node
    if launch.rank == 0 and (reach := top.nodes_of_a_group("tensor")) > 1:
        log.warning(
            "parallel.tensor=%d reaches over %d nodes of %s: every layer waits for the "
            "network; use a parallel.tensor that divides %d",
            *(parallel.tensor, reach, counted(per_node, "rank"), per_node),
        )
