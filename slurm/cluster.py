"""What a cluster's users would otherwise type every time: cluster.toml."""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from parallel.config import Section
from pretrain.config import ConfigError

PLACES = ("cluster.toml", "~/.config/transxssm/cluster.toml")


class ClusterConfig(Section):
    """Defaults of `transxssm submit`; empty fields ask Slurm for nothing."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = ""
    """Limit of a job as sbatch takes it: minutes, hours:minutes:seconds, days-hours."""
    gpus_per_node: int = Field(8, ge=0)
    """0: a cluster without GPUs, one task a node."""
    cpus_per_task: int = Field(0, ge=0)
    gpu_memory: str = "80GiB"
    """Of one GPU: what does not fit is not submitted."""
    sbatch: list[str] = Field(default=[])
    """Further options of sbatch, e.g. "--exclusive"."""
    environment: dict[str, str] = Field(default={})
    """Exported in the job, e.g. NCCL_IB_HCA = "mlx5"."""


def load_cluster() -> ClusterConfig:
    """From $TRANSXSSM_CLUSTER, ./cluster.toml or ~/.config/transxssm/cluster.toml, or defaults.

    Raises ConfigError.
    """
    named = os.environ.get("TRANSXSSM_CLUSTER")
    places = [Path(named)] if named else [Path(place).expanduser() for place in PLACES]
    path = next((place for place in places if named or place.exists()), None)
    if path is None:
        return ClusterConfig()
    try:
        return ClusterConfig.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"TRANSXSSM_CLUSTER: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(map(_explain, error.errors()))}") from error


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        (near,) = difflib.get_close_matches(name, list(ClusterConfig.model_fields), 1, cutoff=0.0)
        return f"unknown field {name}; the nearest valid name is {near}"
    return f"{name}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
