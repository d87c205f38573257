"""The training run: data → schedule → ZeRO step → metrics, evaluation, checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from checkpoints_tools.saving import CheckpointSaver
from checkpoints_tools.sharded import load_checkpoint
from data_pipeline.blend import Blend
from data_pipeline.dataset import PackedDataset
from data_pipeline.tokenizer import parse_tokenizer
from kernels.dispatch import chosen
from parallel.compiled import compile_layers
from parallel.context import local_batch
from parallel.flops import training_flops_per_token
from parallel.graphs import MicroBatchGraphs, graph_maker, why_eager
from parallel.groups import from_rank_0
from parallel.peaks import job_peaks
from parallel.schedule import Mark, count_tokens, forward_backward, mean_loss
from parallel.vitals import Vitals
from pretrain import stop
from pretrain.bad_steps import (
    EVENTS,
    Judge,
    Windows,
    merged,
    passed_to,
    read_windows,
    record_event,
)
from pretrain.config import Config
from pretrain.credentials import dump_recorded, recorded
from pretrain.data import TrainingBatches
from pretrain.evaluation.scores import perplexity, token_bytes
from pretrain.lost_checkpoints import record_saves
from pretrain.lr import learning_rate
from pretrain.metrics import MetricsWriter, peak_memory
from pretrain.resume import go_back, newest_sound
from pretrain.run_dir import began_message, git_revision, package_versions
from pretrain.stage import configured_optimizer
from pretrain.stragglers import Stragglers
from pretrain.timing import Stopwatch, profiled
from pretrain.trackers import open_trackers
from pretrain.validation import validate
from untrusted.errors import UserError
from untrusted.numbers import counted

log = logging.getLogger("transxssm")


class TrainingError(UserError):
    """Training cannot go on; the message says why and what to do."""


def refuse_without_loss(losses: Collection[float], steps: int, run_dir: Path) -> None:
    """Raise TrainingError at the end of a run of which no step had a finite loss.

    losses: those of good steps, as the judge has them.
    """
    if not losses:
        raise TrainingError(
            f"no step of this run, of {steps}, had a finite loss, so that its weights have learned "
            f"nothing; look at the data (`transxssm data inspect`) and at {EVENTS} in {run_dir}"
        )


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
        source = data.sources[0]
        tokenizer = parse_tokenizer(source.tokenizer(), source.tokenizer_name)
        self.token_bytes = token_bytes(tokenizer, config.model.vocab_size).to(device)
        self.progress = progress
        self.step = self.saved_step = 0
        self.samples = 0
        self.unwritten: dict[str, Any] | None = None  # metrics of a step not evaluated yet
        self.evaluation: dict[str, Any] | None = None  # the newest one
        self.skipped: list[tuple[str, int]] = []  # shards, as TrainingBatches has them
        self.judge = Judge(config.training)
        self.losses_known = True  # whether the judge has those of all steps so far
        self.stragglers = Stragglers(config.logging.stragglers_every)
        self.windows: Windows = []  # of samples to pass over
        self.skipped_updates = 0
        self.events: list[tuple[str, str]] = []  # for TensorBoard, since the last step
        self.kernels = ""
        self.trackers = open_trackers(config) if dist.get_rank() == 0 else []
        self.revision = git_revision() if dist.get_rank() == 0 else ""
        self.versions = package_versions()
        self.peaks = job_peaks(device)  # before the model takes the memory
        self.zero = configured_optimizer(config, device)
        if config.training.compile == "layers":
            compile_layers(self.zero.built)
        self.graphs = self._graphs()
        self.saver = CheckpointSaver(
            config.checkpoint_dir,
            self.zero,
            tokenizer=self.run_dir / "tokenizer.json",
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.async_save,
            committed=partial(record_saves, config),
        )

    def _graphs(self) -> MicroBatchGraphs | None:
        """What runs micro-batches as graphs, if they are to be."""
        if self.config.training.cuda_graphs == "off":
            return None
        reason = why_eager(self.config.parallel)
        if self.config.training.compile == "layers" and self.device.type == "cpu":
            reason = 'training.compile="layers": a CPU cannot record what compiled layers compute'
        if reason:
            if dist.get_rank() == 0:
                log.warning("training.cuda_graphs: micro-batches run eagerly (%s)", reason)
            return None
        return MicroBatchGraphs(self.zero, graph_maker(self.device))

    def resume(self, step_dir: Path) -> None:
        """Take over a checkpoint's state."""
        state = load_checkpoint(step_dir, self.zero)
        self.step, self.samples = state["step"], state["samples"]
        self.skipped = [(name, shard) for name, shard in state.get("skipped_shards", [])]
        self.saved_step, self.unwritten = self.step, state.get("unwritten_metrics")
        self.evaluation = state.get("evaluation")
        self.losses_known = "judge" in state  # older checkpoints have none of these
        if self.losses_known:
            self.judge.restore(state["judge"], str(step_dir))
        self.windows = [(first, end) for first, end in state.get("skipped_windows", [])]
        self.skipped_updates = state.get("skipped_updates", 0)

    def run(self) -> str | None:
        """Train to the end of the run; leaves a final checkpoint.

        Returns why all ranks stopped before it, everything being saved, or None.
        """
        total = self.config.total_steps
        self.windows = merged(self.windows, from_rank_0(lambda: read_windows(self.run_dir)))
        batches, writer = self.batches(), self._writer()
        if writer is not None:
            began = began_message(self._written(), dist.get_world_size(), self.revision)
            writer.text("events/starts", began, self._written())
        try:
            while self.step < total or self.unwritten is not None:
                self.saver.poll()
                if self.unwritten is None and self._pass_over_windows():
                    batches.close()
                    batches = self.batches()
                    continue
                with profiled(self.config.logging, self.step + 1):
                    metrics = self.unwritten or self.train_step(batches)
                if metrics is not None and self.validation and self._evaluates_now():
                    self.unwritten = metrics
                    losses = self._validate()
                    metrics = None if losses is None else metrics | losses
                    if losses is not None and math.isfinite(losses["validation_loss"]):
                        loss = losses["validation_loss"]
                        self.evaluation = {"step": self.step, "validation_loss": loss}
                if metrics is None:
                    return self.stop_early()
                self.unwritten = None
                if writer is not None:
                    writer.write(metrics)  # first: a resumed run does not make this step again
                    self._note(writer)
                if self._goes_back():
                    self.roll_back()
                    batches.close()
                    if writer is not None:
                        writer.close()
                    batches, writer = self.batches(), self._writer()
                elif self._saves_now() and self.step > self.saved_step:
                    self.save()
            self.progress("saving")
            if self.step > self.saved_step:  # the last steps were passed over
                self.save()
            self.saver.drain()
            if self.losses_known:
                refuse_without_loss(self.judge.losses, self.step, self.run_dir)
        except TrainingError:  # which all ranks raise alike
            self.saver.drain()
            raise
        finally:
            batches.close()
            for tracker in self.trackers:
                tracker.close()
            if writer is not None:
                writer.close()
        made = counted(self.step, "step")
        log.info("done: %s, checkpoint %s", made, self.config.checkpoint_dir)
        return None

    def _writer(self) -> MetricsWriter | None:
        """Of rank 0, from the present step on."""
        if dist.get_rank() != 0:
            return None
        written = self._written()
        logging_ = self.config.logging
        writer = MetricsWriter(
            self.run_dir,
            written,
            self.config.total_steps,
            logging_.every,
            logging_.tensorboard,
            self.trackers,
        )
        writer.text("run/config", f"```toml\n{dump_recorded(self.config)}```", written)
        return writer

    def _written(self) -> int:
        """Return the last step whose metrics are recorded."""
        return self.step - (self.unwritten is not None)

    def stop_early(self) -> str:
        """Save what is not saved, and wait for it. A collective; returns the reason."""
        reason = stop.requested() or "another rank was asked to"
        log.info("stopping after step %d (%s)", self.step, reason)
        self.progress("saving")
        if self.step > self.saved_step:
            self.save()
        self.saver.drain()
        return reason

    def _validate(self) -> dict[str, float] | None:
        return validate(
            self.config,
            self.zero,
            self.validation,
            self.token_bytes,
            lambda: self.progress(f"step {self.step}: evaluation"),
        )

    def _evaluates_now(self) -> bool:
        every = self.config.training.eval_every
        return bool(every) and (self.step % every == 0 or self.step == self.config.total_steps)

    def _saves_now(self) -> bool:
        every = self.config.checkpoint.every
        regular = bool(every and self.step % every == 0) and not self.judge.bad
        return regular or self.step == self.config.total_steps

    def batches(self) -> TrainingBatches:
        """This rank's batches from the present position on."""
        return TrainingBatches(self.config, self.data, self.samples, self.skipped)

    def train_step(self, batches: TrainingBatches) -> dict[str, Any] | None:
        """One update. Returns the step's metrics; None, and nothing is done, if any rank was asked
        to stop."""
        config, phase = self.config, self.config.phase_at(self.step)
        watch = Stopwatch(self.step + 1, self.progress)
        every = config.logging.vitals_every
        vitals = Vitals(self.zero) if every and (self.step + 1) % every == 0 else None
        begin = time.perf_counter()
        with watch.phase("data"):
            batch_here = batches.next_step()
            if batch_here is None:
                return None
            read = [local_batch(batch, self.device) for batch in batch_here]
        with watch.phase("forward_backward"):
            tokens_here = count_tokens(read, self.device)
            begun = Mark(self.device)
            # what looks at layers, or at what they launch, needs them to run
            eager = vitals or self.step + 1 in config.logging.profile_steps
            run = None if eager or self.graphs is None else self.graphs.run
            with vitals.watching() if vitals else nullcontext():
                sums = forward_backward(self.zero, read, tokens_here, len(self.data.names), run)
            losses, counts, norm = sums.on_host(self.zero.grad_norm())  # the step's one wait
        if vitals:
            with watch.phase("vitals"):
                vitals.gradients()
        tokens = phase.tokens_at(self.step + 1)
        lr = learning_rate(config.optimizer, tokens, config.total_tokens)
        loss = mean_loss(losses, counts)  # None for nothing but padding and skipped shards
        fault = None if loss is None else self.judge.fault(loss, norm)
        self.saver.before_update()
        with watch.phase("step"):
            update = self.zero.step(lr, norm, refused=fault is not None)
        first_sample = self.samples
        self.step, self.samples = self.step + 1, batches.samples_consumed
        self.skipped = batches.skipped
        if not update.applied:
            self._leave_out(first_sample, fault or "gradient norm nan")
        elif loss is not None:
            self.judge.good(loss, update.grad_norm)
        slow = self.stragglers.add(batches.seconds_reading, sums.computed.seconds_since(begun))
        for said in slow:
            self.record("straggler", said)
        seen = {}
        if vitals:
            with watch.phase("vitals"):
                seen = vitals.collect(lr, update.applied)
        rate = phase.tokens_per_step / (time.perf_counter() - begin)
        flops_per_token = training_flops_per_token(config.model, phase.seq_len)
        return {
            "step": self.step,
            "tokens": tokens,
            "samples": self.samples,
            "loss": loss,
            "perplexity": None if loss is None else perplexity(loss),
            **self._by_source(losses, counts),
            "grad_norm": update.grad_norm,
            "skipped_updates": self.skipped_updates,
            "rollbacks": len(self.windows),
            "stragglers": len(slow),
            "lr": lr,
            "tokens_per_second": rate,
            "model_flops_per_second": rate * flops_per_token,
            **{name: rate * flops_per_token / peak for name, peak in self.peaks.items()},
            "memory_bytes": peak_memory(self.device),
            "skipped_shards": len(self.skipped),
            "time_checkpoint": self.saver.take_stall(),
            **{f"time_{name}": seconds for name, seconds in watch.seconds.items()},
            **seen,
        }

    # -- bad steps ---------------------------------------------------------------------------------

    def _leave_out(self, first_sample: int, fault: str) -> None:
        """Of a step whose update was not made. Raises TrainingError where that ends the run."""
        self.skipped_updates += 1
        self.judge.bad.append((self.step, first_sample, fault))
        self.record("update skipped", fault)
        if self.config.training.on_bad_step == "stop":
            raise TrainingError(
                f"step {self.step}: {fault}; stopped before the update. The newest checkpoint in "
                f"{self.config.checkpoint_dir} is from before; lower optimizer.lr or "
                "optimizer.clip_grad_norm and start again"
            )

    def _goes_back(self) -> bool:
        limit = self.config.training.bad_steps_in_a_row
        return bool(limit) and len(self.judge.bad) >= limit

    def roll_back(self) -> None:
        """Take up the newest checkpoint from before the bad steps, and pass over their samples from
        now on. A collective.

        Raises TrainingError when there is none, or after max_rollbacks.
        """
        first_step, first_sample, _ = self.judge.bad[0]
        window = (first_sample, self.samples)
        report = "; ".join(f"step {step}: {fault}" for step, _, fault in self.judge.bad)
        advice = "lower optimizer.lr or optimizer.clip_grad_norm, or look at that data"
        if len(self.windows) >= self.config.training.max_rollbacks:
            before = ", ".join(f"[{first}, {end})" for first, end in self.windows)
            raise TrainingError(
                f"{report} (samples [{window[0]}, {window[1]})). The run has gone back "
                f"{counted(len(self.windows), 'time')}, as often as training.max_rollbacks allows, "
                f"and passed over the samples {before or 'of none'}; {advice}. {EVENTS} in "
                f"{self.run_dir} has every event"
            )
        self.progress("going back")
        self.saver.drain()
        start = newest_sound(self.config.checkpoint_dir, first_step - 1)
        if start is None:
            raise TrainingError(
                f"{report}. There is no checkpoint from before to go back to; {advice}, or save "
                "more often with checkpoint.every"
            )
        windows, skipped_updates = [*self.windows, window], self.skipped_updates
        from_rank_0(lambda: go_back(self.config, start, first_step - 1, windows))
        self.record("rollback", f"to {start.name}, for {report}", window=window)
        self.resume(start)
        self.windows = merged(self.windows, windows)
        self.skipped_updates = skipped_updates
        self.judge.bad.clear()

    def _pass_over_windows(self) -> bool:
        """Leave out the steps whose samples are to be passed over; whether there were any."""
        begin, end = self.samples, passed_to(self.samples, self.windows)
        if begin == end:
            return False
        first = self.step + 1
        while self.samples < end and self.step < self.config.total_steps:
            phase = self.config.phase_at(self.step)
            self.step += 1
            self.samples = phase.samples_at(self.step)
        self.record("window passed over", f"steps {first} to {self.step}", window=(begin, end))
        return True

    def _note(self, writer: MetricsWriter) -> None:
        """Into TensorBoard: events since the last step, and at first what computes."""
        for event, said in self.events:
            writer.text(f"events/{event.replace(' ', '_')}", said, self.step)
        self.events.clear()
        kernels = ", ".join(f"{op}: {' and '.join(sorted(c))}" for op, c in sorted(chosen.items()))
        if kernels != self.kernels:
            self.kernels = kernels
            writer.text("run/kernels", kernels, self.step)

    def record(self, event: str, said: str, **fields: Any) -> None:
        """Note an event of the present step, in the log and in events.jsonl."""
        if dist.get_rank() == 0:
            self.events.append((event, said))
            log.warning("%s at step %d: %s", event, self.step, said)
            record_event(self.run_dir, event, step=self.step, said=said, **fields)

    def _by_source(self, losses: list[float], tokens: list[float]) -> dict[str, float]:
        """Where there are several: the step's loss and the run's tokens so far, of each."""
        names = self.data.names
        if len(names) == 1:
            return {}
        found = {
            f"loss_{name}": loss / count
            for name, loss, count in zip(names, losses, tokens, strict=True)
            if count
        }
        return found | {f"tokens_{name}": n for name, n in self.data.tokens(self.samples).items()}

    def save(self) -> None:
        """Write a checkpoint of this step, or begin to. A collective."""
        parallel = self.config.parallel
        state = {
            "samples": self.samples,
            "tokens": self.config.phase_at(self.step).tokens_at(self.step),
            "skipped_shards": self.skipped,
            "unwritten_metrics": self.unwritten,
            "judge": self.judge.state(),
            "skipped_windows": self.windows,
            "skipped_updates": self.skipped_updates,
            "evaluation": self.evaluation,
            "longest_sequence": max(
                phase.seq_len
                for phase in self.config.phases
                if phase.first_step < max(self.step, 1)
            ),
            "config": recorded(self.config),
            "phases": [asdict(phase) for phase in self.config.phases],
            "sources": self.data.fingerprints,
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
        bad = self.judge.bad  # before which there must be something to go back to
        self.saver.save(self.step, state, keep_up_to=bad[0][0] - 1 if bad else None)
        self.saved_step = self.step
