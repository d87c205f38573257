"""What a cluster's users would otherwise type every time: cluster.toml."""

import codecs
import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from parallel import bounds
from parallel.config import Section
from pretrain.config import ConfigError
from untrusted.files import read_regular
from untrusted.paths import expand_path

MAX_BYTES = 1 << 20
MOST_CPUS = 1 << 16  # of a task
PLACES = ("cluster.toml", "~/.config/transxssm/cluster.toml")


class ClusterConfig(Section):
    """Defaults of `transxssm submit`; empty fields ask Slurm for nothing."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = ""
    """Limit of a job as sbatch takes it: minutes, hours:minutes:seconds, days-hours."""
    gpus_per_node: int = Field(8, ge=0, le=bounds.RANKS_PER_NODE)
    """0: a cluster without GPUs, one task a node."""
    cpus_per_task: int = Field(0, ge=0, le=MOST_CPUS)
    gpu_memory: str = "80GiB"
    """Of one GPU: what does not fit is not submitted."""
    sbatch: list[str] = Field(default=[])
    """Further options of sbatch, e.g. "--exclusive"."""
    environment: dict[str, str] = Field(default={})
    """Exported in the job, e.g. NCCL_IB_HCA = "mlx5". Its values are in no file of the run."""


def load_cluster() -> ClusterConfig:
    """From $TRANSXSSM_CLUSTER, ./cluster.toml or ~/.config/transxssm/cluster.toml, or defaults.

    Raises ConfigError.
    """
    named = os.environ.get("TRANSXSSM_CLUSTER")
    try:
        places = [Path(expand_path(place)) for place in ((named,) if named else PLACES)]
    except ValueError as error:
        raise ConfigError(f"TRANSXSSM_CLUSTER={named}: {error}") from error
    for path in places:
        try:
            content = read_regular(path, MAX_BYTES, follow_link=True)
        except FileNotFoundError as error:
            if named:
                raise ConfigError(f"TRANSXSSM_CLUSTER: there is no file {path}") from error
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"cannot read the cluster's defaults {path}: {reason}") from error
        return parse_cluster(content, path)
    return ClusterConfig()


def parse_cluster(content: bytes, path: Path) -> ClusterConfig:
    """The defaults in a file's content. Raises ConfigError."""
    try:
        return ClusterConfig.model_validate(
            tomllib.loads(content.removeprefix(codecs.BOM_UTF8).decode())
        )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(map(_explain, error.errors()))}") from None


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if name.startswith("environment"):  # whose values may be secrets
        return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "extra_forbidden":
        (near,) = difflib.get_close_matches(name, list(ClusterConfig.model_fields), 1, cutoff=0.0)
        return f"unknown field {name}; the nearest valid name is {near}"
    return f"{name}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
