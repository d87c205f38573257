"""Where the time of a step goes: seconds of its phases, and profiler traces of chosen steps."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.sections import LoggingConfig

log = logging.getLogger("transxssm")


@dataclass
class Stopwatch:
    """Seconds of the host per phase of the current step; none waits for the device by itself."""

    step: int
    progress: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        self.progress(f"step {self.step}: {name}")
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@contextmanager
def profiled(config: LoggingConfig, step: int) -> Iterator[None]:
    """Write a trace of what the body, step `step`, does on this rank, if it is to be profiled."""
    rank = dist.get_rank()
    if step not in config.profile_steps or rank not in config.profile_ranks:
        yield
        return
    with torch.profiler.profile(record_shapes=True) as profile:
        yield
    path = Path(config.run_dir) / "traces" / f"step-{step}-rank-{rank}.json.gz"
    path.parent.mkdir(exist_ok=True)
    profile.export_chrome_trace(str(path))
    log.info("profiled step %d: %s", step, path)
