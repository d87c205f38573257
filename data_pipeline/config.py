"""The [data] section of the configuration. Imports no torch."""

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """Which prepared shards a run reads, and in which order."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    train: str
    """Folder of training shards, as written by `transxssm prepare` (OUT/train)."""
    validation: str = ""
    """Folder of validation shards (OUT/validation); empty: no validation."""
    seq_len: int = Field(1024, ge=1)
    """Tokens a sequence; must equal the --seq-len the shards were packed with."""
    seed: int = Field(1234, ge=0)
    """Seed of the order in which samples are read."""
