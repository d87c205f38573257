"""The [data] section of the configuration. Imports no torch."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SourceConfig(BaseModel):
    """One of several folders of training shards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    path: str
    """Folder of training shards, as written by `transxssm prepare` (OUT/train)."""
    name: str
    """What metrics and stages call it."""
    weight: float = Field(1.0, ge=0)
    """Share of the run's tokens, beside the other sources' weights."""
    max_epochs: float = Field(4.0, gt=0)
    """Warn when the run reads the source more often."""


class StageConfig(BaseModel):
    """Other weights from a point of the run on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    from_tokens: int = Field(ge=1)
    """Tokens of the run before it, rounded up to whole steps."""
    weights: dict[str, float]
    """By source; one that is not named is not read."""


class DataConfig(BaseModel):
    """Which prepared shards a run reads, and in which order."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    train: str = ""
    """Folder of training shards, as written by `transxssm prepare` (OUT/train)."""
    sources: list[SourceConfig] = Field(default_factory=list)
    """Several such folders instead, blended by weight."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Later parts of the run in which the sources' weights are others."""
    validation: str = ""
    """Folder of validation shards (OUT/validation); empty: no validation."""
    seq_len: int = Field(1024, ge=1)
    """Tokens a sequence; must equal the --seq-len the shards were packed with."""
    seed: int = Field(1234, ge=0)
    """Seed of the order in which samples are read."""

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
        if self.sources and not any(source.weight for source in self.sources):
            raise ValueError("data.sources: every weight is 0; use a positive weight for one")
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
