"""The training run: data → schedule → ZeRO step → metrics, evaluation, checkpoints."""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import read_manifest
from checkpoints_tools.sharded import load_checkpoint, save_checkpoint
from data_pipeline.blend import Blend
from data_pipeline.dataset import PackedDataset
from data_pipeline.loader import sequential_batches
from parallel.compat import prepare_host
from parallel.context import local_batch
from parallel.flops import training_flops_per_token
from parallel.groups import destroy_groups, from_rank_0, init_distributed, init_groups
from parallel.launch import Launch
from parallel.schedule import LossSums, count_tokens, evaluate_loss, forward_backward
from parallel.topology import topology
from parallel.zero import ZeroOptimizer
from pretrain.config import Config
from pretrain.data import (
    TrainingBatches,
    keep_tokenizer,
    open_data,
    warn_of_cache,
    warn_of_epochs,
)
from pretrain.lr import learning_rate
from pretrain.metrics import MetricsWriter, peak_memory
from pretrain.run_dir import git_revision, record_start, start_log
from pretrain.stage import configured_stage

log = logging.getLogger("transxssm")


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to do."""


def train(config: Config, launch: Launch) -> None:
    """Run, or go on with, the training that `config` describes, as one rank of the job.

    Raises ConfigError, DataError or CheckpointError before a model is built where it can.
    """
    data_parallel = config.data_parallel(launch.world_size)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        torch.use_deterministic_algorithms(True)
    device = prepare_host(launch.local_rank)
    init_distributed(launch, device)
    init_groups(config.parallel)
    start_log(Path(config.logging.run_dir), launch.rank)
    data, validation = open_data(config)
    # one decision for all: ranks may see the folder differently
    start = from_rank_0(lambda: find_start(config, data))
    from_rank_0(lambda: record_start(config, launch.world_size))
    from_rank_0(lambda: keep_tokenizer(data, Path(config.logging.run_dir)))
    trainer = Trainer(config, data, validation, device)
    log.info(
        "%s parameters, %d ranks: tensor %d × context %d × data %d × pipeline %d, ZeRO %d, %s, %s",
        f"{config.model.num_params()['total']:,}",
        launch.world_size,
        config.parallel.tensor,
        config.parallel.context,
        data_parallel,
        config.parallel.pipeline,
        config.parallel.zero_stage,
        config.training.dtype,
        device.type,
    )
    top = topology(config.parallel, data_parallel, launch.ranks_per_node or launch.world_size)
    if launch.rank == 0 and (reach := top.nodes_of_a_group("tensor")) > 1:
        log.warning(
            "parallel.tensor=%d reaches over %d nodes of %d ranks: every layer waits for the "
            "network; use a parallel.tensor that divides %d",
            *(config.parallel.tensor, reach, launch.ranks_per_node, launch.ranks_per_node),
        )
    if launch.rank == 0:
        warn_of_epochs(config, data)
        warn_of_cache(config, data)
    if start is not None:
        trainer.resume(start)
        log.info("resumed from %s", start)
    trainer.run()
    destroy_groups()


def find_start(config: Config, data: Blend) -> Path | None:
    """The checkpoint to go on from, by checkpoint.resume, checked against config and data.

    `auto` skips damaged checkpoints with a warning. Raises CheckpointError when the checkpoint is
    of another model or other data, or when `none` would mix two runs in one folder.
    """
    folder, resume = config.checkpoint_dir, config.checkpoint.resume
    folders.remove_temporary(folder)
    steps = folders.committed_steps(folder)
    if resume == "none":
        if steps:
            raise CheckpointError(
                f'checkpoint.resume="none", but {folder} holds checkpoints up to step {steps[-1]}; '
                'choose another logging.run_dir, or checkpoint.resume="auto" to go on from them'
            )
        return None
    candidates = [folders.step_folder(folder, s) for s in reversed(steps)]
    if resume != "auto":
        named = folders.resolve(Path(resume))
        if named.resolve() in {path.resolve() for path in candidates[1:]}:
            raise CheckpointError(
                f"checkpoint.resume={named}, but the run has later checkpoints, up to step "
                f'{steps[-1]}; move those away to go back to it, or use checkpoint.resume="auto"'
            )
        if not candidates:  # else the run goes on from its own
            candidates = [named]
    for candidate in candidates:
        try:
            state = read_manifest(candidate)
        except CheckpointError as error:
            if candidate.parent.resolve() != folder.resolve():
                raise
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        _check_same_run(candidate, state, config, data)
        return candidate
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} is sound; restore one, or "
            "choose another logging.run_dir to start anew"
        )
    return None


def _check_same_run(candidate: Path, state: dict[str, Any], config: Config, data: Blend) -> None:
    ours, theirs = config.model.model_dump(), state["config"]["model"]
    changed = [
        f"model.{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"{candidate} is of another model ({'; '.join(changed)}); restore these fields, or "
            "choose another logging.run_dir"
        )
    for section, name in (("data", "seed"), ("data", "seq_len"), ("training", "global_batch_size")):
        there, here = state["config"][section][name], getattr(getattr(config, section), name)
        if there != here:
            raise CheckpointError(
                f"{candidate} was trained with {section}.{name}={there}, not {here}: the order of "
                "the data and the schedule would no longer be those of one run; restore it, or "
                "choose another logging.run_dir"
            )
    if state["data_fingerprint"] != data.fingerprint:
        difference = (
            f"{candidate} was trained on other data than {data.sources[0].folder} (fingerprint "
            f"{state['data_fingerprint'][:12]}… there, {data.fingerprint[:12]}… here)"
        )
        if not config.checkpoint.allow_data_change:
            raise CheckpointError(
                f"{difference}; point data.train at the data it was trained on, choose another "
                "logging.run_dir, or go on with --checkpoint.allow_data_change true"
            )
        log.warning("%s; going on at sample %d of these", difference, state["samples"])


@dataclass
class Stopwatch:
    """Seconds per phase of the current step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time of the body to a phase; waits for the device at its end."""
        begin = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


class Trainer:
    """One rank's live training state and the loop over steps."""

    def __init__(
        self,
        config: Config,
        data: Blend,
        validation: dict[str, PackedDataset],
        device: torch.device,
    ) -> None:
        self.config, self.data, self.validation = config, data, validation
        self.device, self.run_dir = device, Path(config.logging.run_dir)
        self.step = 0
        self.samples = 0
        self.skipped: list[tuple[str, int]] = []  # shards, as TrainingBatches has them
        self.revision = git_revision() if dist.get_rank() == 0 else ""
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

    def resume(self, step_dir: Path) -> None:
        """Take over a checkpoint's state."""
        state = load_checkpoint(step_dir, self.zero)
        self.step, self.samples = state["step"], state["samples"]
        self.skipped = [(name, shard) for name, shard in state.get("skipped_shards", [])]

    def run(self) -> None:
        """Train to the end of the run; leaves a final checkpoint."""
        config, total = self.config, self.config.total_steps
        if self.step >= total:
            log.info("nothing to do: step %d of %d", self.step, total)
            return
        batches = self.batches()
        rank_0 = dist.get_rank() == 0
        writer = (
            MetricsWriter(
                self.run_dir, self.step, total, config.logging.every, config.logging.tensorboard
            )
            if rank_0
            else None
        )
        try:
            while self.step < total:
                metrics = self.train_step(batches)
                if self.validation and self._evaluates_now():
                    metrics |= self.evaluate()
                if writer is not None:
                    writer.write(metrics)  # first: a resumed run does not make this step again
                if self._saves_now():
                    begin = time.perf_counter()
                    path = self.save()
                    log.info("saved %s in %.2f s", path, time.perf_counter() - begin)
        finally:
            batches.close()
            if writer is not None:
                writer.close()
        log.info("done: %d steps, checkpoint %s", self.step, self.config.checkpoint_dir)

    def _evaluates_now(self) -> bool:
        every = self.config.training.eval_every
        return bool(every) and (self.step % every == 0 or self.step == self.config.total_steps)

    def _saves_now(self) -> bool:
        every = self.config.checkpoint.every
        return self.step == self.config.total_steps or bool(every and self.step % every == 0)

    def batches(self) -> TrainingBatches:
        """This rank's batches from the present position on."""
        return TrainingBatches(self.config, self.data, self.samples, self.skipped, self.device)

    def train_step(self, batches: TrainingBatches) -> dict[str, Any]:
        """One update. Returns the step's metrics."""
        config, phase = self.config, self.config.phase_at(self.step)
        watch = Stopwatch()
        begin = time.perf_counter()
        with watch.phase("data", self.device):
            read = [local_batch(batch, self.device) for batch in batches.next_step()]
        with watch.phase("forward_backward", self.device):
            tokens_here = count_tokens(read, self.device)
            sums = forward_backward(self.zero, read, tokens_here, len(self.data.names))
        tokens = phase.tokens_at(self.step + 1)
        lr = learning_rate(config.optimizer, tokens, config.total_tokens)
        with watch.phase("step", self.device):
            grad_norm = self.zero.step(lr)
        self.step, self.samples = self.step + 1, batches.samples_consumed
        self.skipped = batches.skipped
        loss = float(sums.mean)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
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
            "perplexity": _exp(loss),
            **self._by_source(sums),
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": rate,
            "model_flops_per_second": rate * flops_per_token,
            "memory_bytes": peak_memory(self.device),
            "skipped_shards": len(self.skipped),
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

    def evaluate(self) -> dict[str, float]:
        """Mean loss per token in nats, over eval_batches global batches (or all there is) of each
        validation set; of all sets together, and of each where they have names.

        The samples do not depend on the layout.
        """
        training = self.config.training
        loss = tokens = 0.0
        found = {}
        for name, dataset in self.validation.items():
            read = [
                local_batch(batch, self.device)
                for batch in sequential_batches(
                    dataset,
                    training.micro_batch_size,
                    training.eval_batches * training.global_batch_size,
                    data_parallel_rank=parallel_state.get_data_parallel_rank(),
                    data_parallel_size=parallel_state.get_data_parallel_world_size(),
                )
            ]
            sums = evaluate_loss(self.zero, read)
            loss, tokens = loss + float(sums.loss.sum()), tokens + float(sums.tokens.sum())
            if name:
                found[f"validation_loss_{name}"] = float(sums.mean)
        mean = loss / tokens
        return {"validation_loss": mean, "validation_perplexity": _exp(mean)} | found

    def save(self) -> Path:
        """Write and commit a checkpoint of this step; its folder."""
        state = {
            "samples": self.samples,
            "tokens": self.config.phase_at(self.step).tokens_at(self.step),
            "skipped_shards": self.skipped,
            "config": self.config.model_dump(mode="json"),
            "data_fingerprint": self.data.fingerprint,
            "tokenizer_hash": self.data.meta.tokenizer_hash,
            "eod_id": self.data.meta.eod_id,
            "pad_id": self.data.meta.pad_id,
            "git_revision": self.revision,
        }
        return save_checkpoint(
            self.config.checkpoint_dir,
            self.step,
            self.zero,
            state,
            tokenizer=self.run_dir / "tokenizer.json",
            keep_last=self.config.checkpoint.keep_last,
            keep_every=self.config.checkpoint.keep_every,
        )


def _exp(loss: float) -> float:
    """Perplexity of a loss; inf rather than an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
