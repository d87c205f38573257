"""The parts of a run: which sources, how long sequences, in what batches, from which step on.

A run has one global sample counter whatever its phases: a phase begins at a step, hence at a sample
and at a token.
"""

import math
from dataclasses import dataclass

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
    phases = [Phase(0, 0, 0, data.seq_len, global_batch_size, micro_batch_size, weights)]
    for stage in data.stages:
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
                stage.global_batch_size or _same_tokens(stage, phases[0], seq_len),
                stage.micro_batch_size or max(1, micro_batch_size * data.seq_len // seq_len),
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
