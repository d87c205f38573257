"""The [data] section of the configuration. Imports no torch."""

import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from parallel import bounds
from untrusted.paths import ConfiguredPath, NamedPaths


class SourceConfig(BaseModel):
    """One of several folders of training shards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    path: ConfiguredPath
    """Folder or URL of training shards, as written by `transxssm prepare` (OUT/train)."""
    seq_len: int = Field(0, ge=0, le=bounds.LENGTH)
    """That of its shards; 0: data.seq_len."""
    name: str
    """What metrics and stages call it."""
    weight: float = Field(1.0, ge=0, le=bounds.LARGEST)
    """Share of the run's tokens, beside the other sources' weights."""
    max_epochs: float = Field(4.0, gt=0, le=bounds.COUNT)
    """Warn when the run reads the source more often."""


class StageConfig(BaseModel):
    """Other weights, or sources of another sequence length, from a point of the run on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    from_tokens: int = Field(ge=1, le=bounds.TOKENS)
    """Tokens of the run before it, rounded up to whole steps."""
    weights: dict[str, Annotated[float, Field(le=bounds.LARGEST)]]
    """By source; one that is not named is not read."""
    global_batch_size: int = Field(0, ge=0, le=bounds.BATCH)
    """Sequences per update; 0: so many that an update has as many tokens as before."""
    micro_batch_size: int = Field(0, ge=0, le=bounds.BATCH)
    """Sequences per forward pass; 0: so many that it has as many tokens as before."""


class DataConfig(BaseModel):
    """Which prepared shards a run reads, and in which order."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    train: ConfiguredPath = ""
    """Folder or URL of training shards, as written by `transxssm prepare` (OUT/train)."""
    sources: list[SourceConfig] = Field(default_factory=list, max_length=bounds.SOURCES)
    """Several such folders instead, blended by weight."""
    stages: list[StageConfig] = Field(default_factory=list, max_length=bounds.STAGES)
    """Later parts of the run in which the sources' weights, or sequences, are others."""
    validation: NamedPaths = ""
    """Folder or URL of validation shards (OUT/validation), or several by name; empty: none."""
    seq_len: int = Field(1024, ge=1, le=bounds.LENGTH)
    """Tokens a sequence; must equal the --seq-len the shards were packed with."""
    seed: int = Field(1234, ge=0, le=bounds.SEED)
    """Seed of the order in which samples are read."""
    shuffle_window: int = Field(1 << 32, ge=1, le=bounds.TOKENS)
    """Tokens among which samples are shuffled: all of their shards are in use at a time."""
    num_workers: int = Field(1, ge=0, le=bounds.THREADS)
    """Threads that read ahead; 0: none does."""
    skip_bad_shards: int = Field(0, ge=0, le=bounds.COUNT)
    """How many bad training shards a run may pass over, their samples without loss; 0: the first
    ends it. A bad validation shard always does: losses over other samples do not compare."""
    cache_dir: str = ""
    """This node's folder for copies of remote and compressed shards; empty: below $TMPDIR. Its
    variables are those of the node."""
    cache_gib: float = Field(256.0, ge=1e-6, le=bounds.COUNT)
    """How large the copies may be together."""
    download_attempts: int = Field(4, ge=1, le=20)
    """Before a remote file is given up; the waits between them double."""
    download_timeout: float = Field(60.0, ge=0.01, le=1e6)
    """Seconds that a remote may be silent."""

    @property
    def validation_sets(self) -> dict[str, str]:
        """Folders by name; a single one has no name."""
        if isinstance(self.validation, str):
            return {"": self.validation} if self.validation else {}
        return self.validation

    def stage_seq_len(self, weights: dict[str, float]) -> int:
        """Of the sources that have a weight. Raises ValueError if they differ."""
        lengths = {
            source.name: source.seq_len or self.seq_len
            for source in self.sources
            if weights.get(source.name, 0.0)
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"data.sources of one stage have the seq_len {lengths}; give weights to sources of "
                "one length"
            )
        return next(iter(lengths.values()), self.seq_len)

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if bool(self.train) == bool(self.sources):
            given = f"data.train={self.train!r} and {len(self.sources)} data.sources"
            missing = "data.train is missing; set it in the file or with --data.train, or list"
            raise ValueError(
                f"{given}; use one of them" if self.train else f"{missing} data.sources"
            )
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources have the names {names}; use each once")
        self._check_paths()
        if self.sources and not any(source.weight for source in self.sources):
            raise ValueError("data.sources: every weight is 0; use a positive weight for one")
        first = self.stage_seq_len({source.name: source.weight for source in self.sources})
        if first != self.seq_len:
            raise ValueError(
                f"data.seq_len={self.seq_len}, but the sources that the run begins with have "
                f"seq_len={first}; set data.seq_len={first}"
            )
        if self.stages and not self.sources:
            raise ValueError("data.stages need data.sources; list those, or remove the stages")
        starts = [stage.from_tokens for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"data.stages begin at from_tokens {starts}; use rising numbers")
        for stage in self.stages:
            if unknown := sorted(stage.weights.keys() - set(names)):
                raise ValueError(
                    f"data.stages.weights name {unknown}, and data.sources are {names}; use those"
                )
            weights = stage.weights.values()
            if min(weights, default=-1) < 0 or not any(weights):
                raise ValueError(
                    f"data.stages.weights={stage.weights}: use numbers ≥ 0, one of them positive"
                )
        return self

    def _check_paths(self) -> None:
        """Raises ValueError when two sources are one folder."""
        named: dict[str, str] = {}
        for source in self.sources:
            path = source.path.rstrip("/") if "://" in source.path else os.path.abspath(source.path)
            if path in named:
                raise ValueError(
                    f"data.sources {named[path]} and {source.name} have one path, {source.path}; "
                    "list it once, with the sum of their weights"
                )
            named[path] = source.name
