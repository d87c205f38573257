"""Other places that a run's metrics go to: Weights & Biases, and a Prometheus text file.

Both packages come with `pip install 'transxssm[monitoring]'`.
"""

import hashlib
import importlib.util
import logging
import math
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import Config, ConfigError
from pretrain.credentials import recorded

log = logging.getLogger("transxssm")

PREFIX = "transxssm_"


class Tracker(Protocol):
    """Told the metrics of every step."""

    def write(self, metrics: dict[str, Any]) -> None:
        """Numbers, by name; "step" is one of them."""

    def close(self) -> None:
        """At the end of the run, or of this start of it."""


def check_trackers(config: Config) -> None:
    """Raises ConfigError where a package is missing."""
    wanted = {
        "wandb_project": ("wandb", config.logging.wandb_project),
        "prometheus_file": ("prometheus_client", config.logging.prometheus_file),
    }
    for field, (package, value) in wanted.items():
        if value and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{field}={value!r} needs the package {package}, which is not installed: "
                "pip install 'transxssm[monitoring]', or leave the field empty"
            )


def open_trackers(config: Config) -> list[Tracker]:
    """Those that the configuration names."""
    found: list[Tracker] = []
    if config.logging.wandb_project and (wandb := open_wandb(config)) is not None:
        found.append(wandb)
    if config.logging.prometheus_file:
        found.append(PrometheusTracker(Path(config.logging.prometheus_file), config))
    return found


def open_wandb(config: Config) -> "WandbTracker | None":
    """The tracker, or None where its service does not answer. Raises ConfigError if it refuses."""
    from wandb.errors import AuthenticationError, CommError, UsageError

    try:
        return WandbTracker(config)
    except (UsageError, AuthenticationError) as error:
        raise ConfigError(
            f"logging.wandb_project={config.logging.wandb_project!r}: W&B refuses "
            f"({' '.join(str(error).split())}); log in with `wandb login`, set WANDB_MODE=offline, "
            "or leave the field empty"
        ) from error
    except CommError as error:
        log.warning("W&B does not answer (%s): training goes on without it", error)
        return None


class WandbTracker:
    """One run of Weights & Biases for all starts of a run."""

    def __init__(self, config: Config) -> None:
        import wandb

        run_dir = Path(config.logging.run_dir).resolve()
        self.run = wandb.init(
            project=config.logging.wandb_project,
            name=run_dir.name,
            id=hashlib.sha256(str(run_dir).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run_dir),
            config=recorded(config),
            # the command line, all of SLURM_* with SLURM_JWT, and git's remote address
            settings=wandb.Settings(x_disable_meta=True, disable_git=True),
        )

    def write(self, metrics: dict[str, Any]) -> None:
        """See Tracker. A step made again after a requeue is one that W&B has already."""
        self.run.log(numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        """See Tracker."""
        self.run.finish()


class PrometheusTracker:
    """The newest values, for node_exporter's textfile collector."""

    def __init__(self, path: Path, config: Config) -> None:
        from prometheus_client import CollectorRegistry, Gauge

        self.path, self.run = path, str(Path(config.logging.run_dir).resolve())
        self.registry, self.make = CollectorRegistry(), Gauge
        self.gauges: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, metrics: dict[str, Any]) -> None:
        """See Tracker. The file is replaced whole."""
        from prometheus_client import write_to_textfile

        for name, value in numbers(metrics).items():
            if name not in self.gauges:
                clean = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
                self.gauges[name] = self.make(
                    PREFIX + clean, f"{name} of the newest step", ["run"], registry=self.registry
                )
            self.gauges[name].labels(run=self.run).set(value)
        write_to_textfile(str(self.path), self.registry)

    def close(self) -> None:
        """See Tracker: the last values stay."""


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Those of the metrics that are finite."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
