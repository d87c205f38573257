"""The training run: data → schedule → ZeRO step → metrics, evaluation, checkpoints."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from checkpoints_tools.saving import CheckpointSaver
from checkpoints_tools.sharded import load_checkpoint
from data_pipeline.blend import Blend
from data_pipeline.dataset import PackedDataset
from data_pipeline.loader import sequential_batches
from parallel.compat import prepare_host
from parallel.context import local_batch
from parallel.flops import training_flops_per_token
from parallel.groups import (
    destroy_groups,
    from_rank_0,
    init_distributed,
    init_groups,
    largest_of_all,
)
from parallel.launch import Launch
from parallel.schedule import LossSums, count_tokens, evaluate_loss, forward_backward
from parallel.topology import topology
from parallel.zero import ZeroOptimizer
from pretrain import stop
from pretrain.config import Config, ConfigError
from pretrain.data import TrainingBatches, warn_of_cache, warn_of_epochs
from pretrain.lr import learning_rate
from pretrain.metrics import MetricsWriter, peak_memory
from pretrain.resume import find_start, load_weights
from pretrain.run_dir import git_revision, package_versions, record_start, start_log
from pretrain.sources import keep_tokenizer, open_data
from pretrain.stage import configured_stage
from pretrain.watchdog import Watchdog

log = logging.getLogger("transxssm")


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to do."""


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
    run_dir = Path(config.logging.run_dir)
    start_log(run_dir, launch.rank)
    timeout = config.training.hang_timeout
    with Watchdog(launch, timeout, run_dir / "logs", started) as watchdog:
        reason = _train(config, launch, device, watchdog)
    destroy_groups()
    return reason


def _train(config: Config, launch: Launch, device: torch.device, watchdog: Watchdog) -> str | None:
    init_groups(config.parallel)
    from_rank_0(lambda: _watch_time_left(config.training.stop_before_limit))
    data, validation = open_data(config)
    start = find_start(config, data)
    from_rank_0(lambda: record_start(config, launch.world_size))
    from_rank_0(lambda: keep_tokenizer(data, Path(config.logging.run_dir)))
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
    stop.training_begins()
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


@dataclass
class Stopwatch:
    """Seconds per phase of the current step."""

    device: torch.device
    step: int
    progress: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase; waits for the device at its end."""
        self.progress(f"step {self.step}: {name}")
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


class Trainer:
    """One rank's live training state and the loop over steps."""

    def __init__(
        self,
        config: Config,
        data: Blend,
        validation: dict[str, PackedDataset],
        device: torch.device,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """progress: told what begins now."""
        self.config, self.data, self.validation = config, data, validation
        self.device, self.run_dir = device, Path(config.logging.run_dir)
        self.progress = progress
        self.step = self.saved_step = 0
        self.samples = 0
        self.unwritten: dict[str, Any] | None = None  # metrics of a step not evaluated yet
        self.skipped: list[tuple[str, int]] = []  # shards, as TrainingBatches has them
        self.revision = git_revision() if dist.get_rank() == 0 else ""
        self.versions = package_versions()
        optimizer = config.optimizer
        self.zero = ZeroOptimizer(
            configured_stage(config, device),
            config.parallel,
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip_grad_norm=optimizer.clip_grad_norm,
        )
        self.saver = CheckpointSaver(
            config.checkpoint_dir,
            self.zero,
            tokenizer=self.run_dir / "tokenizer.json",
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.async_save,
        )

    def resume(self, step_dir: Path) -> None:
        """Take over a checkpoint's state."""
        state = load_checkpoint(step_dir, self.zero)
        self.step, self.samples = state["step"], state["samples"]
        self.skipped = [(name, shard) for name, shard in state.get("skipped_shards", [])]
        self.saved_step, self.unwritten = self.step, state.get("unwritten_metrics")

    def run(self) -> str | None:
        """Train to the end of the run; leaves a final checkpoint.

        Returns why all ranks stopped before it, everything being saved, or None.
        """
        config, total = self.config, self.config.total_steps
        if self.step >= total and self.unwritten is None:
            log.info("nothing to do: step %d of %d", self.step, total)
            return None
        batches = self.batches()
        rank_0 = dist.get_rank() == 0
        written = self.step - (self.unwritten is not None)
        writer = (
            MetricsWriter(
                self.run_dir, written, total, config.logging.every, config.logging.tensorboard
            )
            if rank_0
            else None
        )
        try:
            while self.step < total or self.unwritten is not None:
                self.saver.poll()
                metrics = self.unwritten or self.train_step(batches)
                if metrics is not None and self.validation and self._evaluates_now():
                    self.unwritten = metrics
                    metrics = self.evaluate(metrics)
                if metrics is None:
                    return self.stop_early()
                self.unwritten = None
                if writer is not None:
                    writer.write(metrics)  # first: a resumed run does not make this step again
                if self._saves_now() and self.step > self.saved_step:
                    self.save()
            self.progress("saving")
            self.saver.drain()
        except TrainingError as error:  # which all ranks raise alike
            log.error("%s", error)
            self.saver.drain()
            raise
        finally:
            batches.close()
            if writer is not None:
                writer.close()
        log.info("done: %d steps, checkpoint %s", self.step, self.config.checkpoint_dir)
        return None

    def stop_early(self) -> str:
        """Save what is not saved, and wait for it. A collective; returns the reason."""
        reason = stop.requested() or "another rank was asked to"
        log.info("stopping after step %d (%s)", self.step, reason)
        self.progress("saving")
        if self.step > self.saved_step:
            self.save()
        self.saver.drain()
        return reason

    def _evaluates_now(self) -> bool:
        every = self.config.training.eval_every
        return bool(every) and (self.step % every == 0 or self.step == self.config.total_steps)

    def _saves_now(self) -> bool:
        every = self.config.checkpoint.every
        return self.step == self.config.total_steps or bool(every and self.step % every == 0)

    def batches(self) -> TrainingBatches:
        """This rank's batches from the present position on."""
        return TrainingBatches(self.config, self.data, self.samples, self.skipped)

    def train_step(self, batches: TrainingBatches) -> dict[str, Any] | None:
        """One update. Returns the step's metrics; None, and nothing is done, if any rank was asked
        to stop."""
        config, phase = self.config, self.config.phase_at(self.step)
        watch = Stopwatch(self.device, self.step + 1, self.progress)
        begin = time.perf_counter()
        with watch.phase("data"):
            batch_here = batches.next_step()
            if batch_here is None:
                return None
            read = [local_batch(batch, self.device) for batch in batch_here]
        with watch.phase("forward_backward"):
            tokens_here = count_tokens(read, self.device)
            sums = forward_backward(self.zero, read, tokens_here, len(self.data.names))
        tokens = phase.tokens_at(self.step + 1)
        lr = learning_rate(config.optimizer, tokens, config.total_tokens)
        self.saver.before_update()
        with watch.phase("step"):
            grad_norm = self.zero.step(lr)
        self.step, self.samples = self.step + 1, batches.samples_consumed
        self.skipped = batches.skipped
        # of a step of nothing but padding and skipped shards there is no loss
        loss = float(sums.mean) if float(sums.tokens.sum()) else None
        if not math.isfinite(loss or 0.0) or not math.isfinite(grad_norm):
            raise TrainingError(
                f"step {self.step}: loss {loss}, gradient norm {grad_norm}; stopped. The newest "
                f"checkpoint in {config.checkpoint_dir} is from before; lower optimizer.lr or "
                "optimizer.clip_grad_norm and start again"
            )
        rate = phase.tokens_per_step / (time.perf_counter() - begin)
        flops_per_token = training_flops_per_token(config.model, phase.seq_len)
        return {
            "step": self.step,
            "tokens": tokens,
            "samples": self.samples,
            "loss": loss,
            "perplexity": None if loss is None else _exp(loss),
            **self._by_source(sums),
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": rate,
            "model_flops_per_second": rate * flops_per_token,
            "memory_bytes": peak_memory(self.device),
            "skipped_shards": len(self.skipped),
            "time_checkpoint": self.saver.take_stall(),
            **{f"time_{name}": seconds for name, seconds in watch.seconds.items()},
        }

    def _by_source(self, sums: LossSums) -> dict[str, float]:
        """Where there are several: the step's loss and the run's tokens so far, of each."""
        names = self.data.names
        if len(names) == 1:
            return {}
        losses, tokens = sums.loss.tolist(), sums.tokens.tolist()
        found = {
            f"loss_{name}": loss / count
            for name, loss, count in zip(names, losses, tokens, strict=True)
            if count
        }
        return found | {f"tokens_{name}": n for name, n in self.data.tokens(self.samples).items()}

    def evaluate(self, metrics: dict[str, Any]) -> dict[str, Any] | None:
        """`metrics`, and the mean loss per token in nats over eval_batches global batches (or all
        there is) of each validation set; of all sets together, and of each where they have names.
        None if any rank was asked to stop.

        The samples do not depend on the layout.
        """
        training = self.config.training
        loss = tokens = 0.0
        found = {}
        ranks = parallel_state.get_data_parallel_world_size()
        micro_batches = training.global_batch_size // (training.micro_batch_size * ranks)
        for name, dataset in self.validation.items():
            batches = sequential_batches(
                dataset,
                training.micro_batch_size,
                training.eval_batches * training.global_batch_size,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=ranks,
            )
            set_loss = set_tokens = 0.0
            while read := [local_batch(b, self.device) for b in islice(batches, micro_batches)]:
                self.progress(f"step {self.step}: evaluation")
                if largest_of_all(int(stop.requested() is not None)):
                    return None
                sums = evaluate_loss(self.zero, read)
                set_loss += float(sums.loss.sum())
                set_tokens += float(sums.tokens.sum())
            loss, tokens = loss + set_loss, tokens + set_tokens
            if name:
                found[f"validation_loss_{name}"] = set_loss / max(set_tokens, 1)
        mean = loss / tokens
        return metrics | {"validation_loss": mean, "validation_perplexity": _exp(mean)} | found

    def save(self) -> None:
        """Write a checkpoint of this step, or begin to. A collective."""
        parallel = self.config.parallel
        state = {
            "samples": self.samples,
            "tokens": self.config.phase_at(self.step).tokens_at(self.step),
            "skipped_shards": self.skipped,
            "unwritten_metrics": self.unwritten,
            "config": self.config.model_dump(mode="json"),
            "layout": parallel.model_dump(mode="json")
            | {"data": parallel_state.get_data_parallel_world_size()},
            "data_fingerprint": self.data.fingerprint,
            "tokenizer_hash": self.data.meta.tokenizer_hash,
            "eod_id": self.data.meta.eod_id,
            "pad_id": self.data.meta.pad_id,
            "git_revision": self.revision,
            "versions": self.versions,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.saver.save(self.step, state)
        self.saved_step = self.step


def _exp(loss: float) -> float:
    """Perplexity of a loss; inf rather than an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
