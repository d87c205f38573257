"""The parts of a run: which sources, how long sequences, in what batches, from which step on.

A run has one global sample counter whatever its phases: a phase begins at a step, hence at a sample
and at a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.config import DataConfig, StageConfig


@dataclass(frozen=True)
class Phase:
    """From its first step to the next phase, or the end."""

    first_step: int
    first_sample: int
    first_token: int
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    weights: tuple[float, ...]
    """Of the sources, in tokens."""

    @property
    def settings(self) -> tuple[Any, ...]:
        """What decides which samples a step reads, besides where the phase begins."""
        return self.seq_len, self.global_batch_size, self.weights

    @property
    def tokens_per_step(self) -> int:
        """Padding included."""
        return self.global_batch_size * self.seq_len

    def step_of_token(self, token: int) -> int:
        """The first step that begins after so many tokens of the run."""
        return self.first_step + math.ceil((token - self.first_token) / self.tokens_per_step)

    def tokens_at(self, step: int) -> int:
        """Of the run before a step of this phase, or the one after it."""
        return self.first_token + (step - self.first_step) * self.tokens_per_step

    def samples_at(self, step: int) -> int:
        """Of the run before a step of this phase, or the one after it."""
        return self.first_sample + (step - self.first_step) * self.global_batch_size


def run_phases(data: DataConfig, global_batch_size: int, micro_batch_size: int) -> list[Phase]:
    """In order. Raises ValueError for stages that do not go together with the batch."""
    weights = tuple(source.weight for source in data.sources) or (1.0,)
    first = Phase(0, 0, 0, data.seq_len, global_batch_size, micro_batch_size, weights)
    return _followed([first], data, data.stages, first)


def continued_phases(
    made: Sequence[Phase],
    data: DataConfig,
    global_batch_size: int,
    micro_batch_size: int,
    step: int,
) -> list[Phase]:
    """Return the phases of a run that goes on after `step`: as it has `made` them, and from there
    on as they are configured now.

    Where what is configured for the present token differs from what the run did last, a phase
    begins with the next step. Raises ValueError as `run_phases` does.
    """
    configured = run_phases(data, global_batch_size, micro_batch_size)
    phases = [phase for phase in made if phase.first_step < step]
    if not phases:
        return configured
    last = phases[-1]
    begins = replace(
        last, first_step=step, first_sample=last.samples_at(step), first_token=last.tokens_at(step)
    )
    number = sum(stage.from_tokens <= begins.first_token for stage in data.stages)
    now = configured[number]
    if now.settings == last.settings:
        phases[-1] = replace(last, micro_batch_size=now.micro_batch_size)
    else:
        phases.append(
            replace(
                now,
                first_step=step,
                first_sample=begins.first_sample,
                first_token=begins.first_token,
            )
        )
    return _followed(phases, data, data.stages[number:], configured[0])


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The part of the run that makes the step after so many."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step)


def length(phases: Sequence[Phase], steps: int, tokens: int) -> tuple[int, int]:
    """Steps and tokens of a run of so many steps or, where these are 0, so many tokens."""
    if not steps:
        last = next(phase for phase in reversed(phases) if phase.first_token <= tokens)
        steps = last.step_of_token(tokens)
    return steps, phase_at(phases, steps).tokens_at(steps)


def _followed(
    phases: list[Phase], data: DataConfig, stages: Sequence[StageConfig], first: Phase
) -> list[Phase]:
    """`phases` and those of later stages; first: that of [training], from which stages have what
    they do not say."""
    phases = list(phases)
    for stage in stages:
        before = phases[-1]
        step = before.step_of_token(stage.from_tokens)
        if step == before.first_step:
            raise ValueError(
                f"data.stages: the one from token {stage.from_tokens:,} begins in the same step as "
                f"the one before it; move it by {before.tokens_per_step:,} tokens or more"
            )
        seq_len = data.stage_seq_len(stage.weights)
        phases.append(
            Phase(
                step,
                before.samples_at(step),
                before.tokens_at(step),
                seq_len,
                stage.global_batch_size or _same_tokens(stage, first, seq_len),
                stage.micro_batch_size or max(1, first.micro_batch_size * data.seq_len // seq_len),
                tuple(stage.weights.get(source.name, 0.0) for source in data.sources),
            )
        )
    return phases


def _same_tokens(stage: StageConfig, first: Phase, seq_len: int) -> int:
    """Sequences of a global batch that has as many tokens as those of the first phase."""
    if first.tokens_per_step % seq_len:
        raise ValueError(
            f"data.stages: from token {stage.from_tokens:,} on sequences have {seq_len} tokens, "
            f"which do not divide a step's {first.tokens_per_step:,}; set global_batch_size in "
            "that stage"
        )
    return first.tokens_per_step // seq_len
