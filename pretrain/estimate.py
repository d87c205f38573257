"""What a run will need, before anything is built, and the layouts that need least.

Imports no torch: it answers in a second, on any machine.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from parallel.flops import training_flops_per_token
from parallel.footprint import Workload
from parallel.memory import RankMemory, memory_by_stage
from parallel.roofline import (
    GPUS,
    StepTime,
    bubble_share,
    expected_time,
    stage_seconds,
    step_time,
)
from parallel.split import layer_chunks
from parallel.topology import AXES, Topology, topology
from parallel.traffic import traffic
from pretrain.config import Config, ConfigError, parse_config

RESERVED = 0.08  # of a GPU's memory, assumed: CUDA context, NCCL's buffers, fragments
GIB = 2**30
AS_GOOD = 0.05  # by how much a simpler layout may be slower than the fastest


@dataclass(frozen=True)
class Job:
    """The GPUs a run is to get."""

    nodes: int
    gpus_per_node: int
    gpu_memory: int  # bytes
    gpu: str

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> int:
        """Bytes of a GPU that tensors may take."""
        return int(self.gpu_memory * (1 - RESERVED))


@dataclass(frozen=True)
class Estimate:
    """Of one layout on one job."""

    config: Config
    work: Workload
    top: Topology
    chunks: list[range]
    memory: list[RankMemory]  # of a rank of each stage
    bound: StepTime

    @property
    def expected(self) -> StepTime:
        """Of a step that runs, rather than of one at all peaks."""
        return expected_time(self.bound, self.config.parallel)

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.peak for stage in self.memory)

    @property
    def bubble(self) -> float:
        """Idle share of a stage's time, of equal stages."""
        parallel = self.config.parallel
        return bubble_share(parallel.pipeline, parallel.virtual_pipeline, self.work.micro_batches)

    def tokens_per_second(self, time: StepTime) -> float:
        """Of all GPUs, at this time of a step."""
        return self.work.tokens_per_step / time.total

    def complexity(self) -> tuple[int, ...]:
        """Smaller for layouts that are simpler to run: fewer axes and ranks that share a model, one
        model chunk a stage, less ZeRO and less recomputation."""
        parallel = self.config.parallel
        sizes = (parallel.tensor, parallel.context, parallel.pipeline)
        again = ("none", "selective", "full").index(parallel.recompute)
        return (
            sum(size > 1 for size in sizes),
            math.prod(sizes),
            parallel.virtual_pipeline,
            parallel.zero_stage,
            again,
        )


def one_replica(config: Config) -> tuple[int, int]:
    """Nodes, and GPUs of each, that hold the model once."""
    parallel = config.parallel
    ranks = parallel.tensor * parallel.context * parallel.pipeline
    node = max(n for n in range(1, min(8, ranks) + 1) if ranks % n == 0)
    return ranks // node, node


def parse_memory(text: str) -> int:
    """Bytes of "80GiB", "80GB" or a number of bytes. Raises ConfigError."""
    units = {"GiB": GIB, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "TiB": 2**40, "": 1}
    number = text.rstrip("GiBMT").strip()
    unit = text[len(number) :].strip()
    try:
        found = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):  # infinite, too
        found = 0
    if not 0 < found < 1 << 60:
        raise ConfigError(f"--gpu-memory {text!r} is not a size; write e.g. 80GiB or 80GB")
    return found


def workload(config: Config, data: int) -> Workload:
    """One step of a rank of `data` data-parallel ones, on a GPU, of the run's phase that has the
    most tokens in a micro-batch."""
    phase = max(config.phases, key=lambda p: p.micro_batch_size * p.seq_len)
    return Workload(
        data=data,
        seq_len=phase.seq_len,
        micro_batch_size=phase.micro_batch_size,
        micro_batches=phase.global_batch_size // (phase.micro_batch_size * data),
        itemsize=2 if config.training.dtype == "bf16" else 4,
    )


def estimate(config: Config, job: Job) -> Estimate:
    """Raises ConfigError where the layout does not fit the job's processes or the batch."""
    model, parallel = config.model, config.parallel
    data = config.data_parallel(job.world_size)
    work = workload(config, data)
    top = topology(parallel, data, job.gpus_per_node)
    chunks = layer_chunks(model, parallel, max(config.seq_lens))
    memory = memory_by_stage(model, parallel, work, chunks)
    bound = step_time(model, parallel, work, chunks, GPUS[job.gpu], top)
    return Estimate(config, work, top, chunks, memory, bound)


def as_plain(result: Estimate, job: Job) -> dict[str, Any]:
    """The whole estimate in plain values; bytes, seconds, FLOPs."""
    config, work, chunks = result.config, result.work, result.chunks
    parallel = config.parallel
    seconds_by_stage = stage_seconds(config.model, parallel, work, chunks, GPUS[job.gpu])
    return {
        "parallel": parallel.model_dump(),
        "micro_batch_size": work.micro_batch_size,
        "sizes": {axis: getattr(result.top, axis) for axis in AXES},
        "parameters": config.model.num_params(),
        "flops_per_token": training_flops_per_token(config.model, work.seq_len),
        "stages": [
            {
                "layers": [[c.start, c.stop] for c in result.chunks[s :: parallel.pipeline]],
                "memory": stage.by_category(),
                "peak": stage.peak,
                "traffic": traffic(config.model, parallel, work, s, result.chunks),
                "seconds_per_micro_batch": seconds,
            }
            for s, (stage, seconds) in enumerate(zip(result.memory, seconds_by_stage, strict=True))
        ],
        "fits": result.peak <= job.usable,
        "bubble": result.bubble,
        **(_times(result, job) if work.itemsize == 2 else {}),  # peaks are those of bf16 products
    }


def _times(result: Estimate, job: Job) -> dict[str, Any]:
    return {
        "peaks": asdict(GPUS[job.gpu]),
        "bound": _time(result, job, result.bound),
        "expected": _time(result, job, result.expected),
    }


def _time(result: Estimate, job: Job, time: StepTime) -> dict[str, Any]:
    return {
        "step_seconds": {
            "compute": time.compute,
            "bubble": time.bubble,
            "update": time.update,
            **{f"{axis} communication": seconds for axis, seconds in time.communication.items()},
        },
        "tokens_per_second": result.tokens_per_second(time),
        "model_flops_utilization": utilization(result, job, time),
    }


def utilization(result: Estimate, job: Job, time: StepTime) -> float:
    """Model FLOPs a second over the GPUs' peak."""
    flops = training_flops_per_token(result.config.model, result.work.seq_len)
    return result.tokens_per_second(time) * flops / job.world_size / GPUS[job.gpu].flops


def overrides(config: Config) -> str:
    """The options that turn any configuration of this model into this layout."""
    names = ("tensor", "context", "pipeline", "virtual_pipeline", "zero_stage", "recompute")
    words = [f"--parallel.{name} {getattr(config.parallel, name)}" for name in names]
    return " ".join([*words, f"--training.micro_batch_size {config.training.micro_batch_size}"])


def layouts(config: Config, job: Job) -> Iterator[Estimate]:
    """Every valid layout of the model on the job, the batch and the data as they are.

    Tensor parallelism stays within a node.
    """
    world, node = job.world_size, job.gpus_per_node
    model, batch = config.model, config.training.global_batch_size
    for tensor, pipeline, context in itertools.product(
        _divisors(node), _divisors(world), _divisors(world)
    ):
        ranks = tensor * pipeline * context
        if world % ranks or pipeline > model.num_layers:
            continue
        share = batch // (world // ranks)
        virtual = (
            [v for v in (1, 2, 4) if v * pipeline <= model.num_layers] if pipeline > 1 else [1]
        )
        for chunks, zero_stage, recompute, micro_batch in itertools.product(
            virtual,
            (1,) if pipeline > 1 else (1, 2, 3),
            ("none", "selective", "full"),
            [d for d in _divisors(share) if d <= 16] if share else [],
        ):
            changed = _with(
                config,
                micro_batch,
                tensor=tensor, pipeline=pipeline, context=context, virtual_pipeline=chunks,
                zero_stage=zero_stage, recompute=recompute,
            )  # fmt: skip
            if changed is not None:
                try:
                    yield estimate(changed, job)
                except ConfigError:  # the batch does not divide
                    continue


def best_first(found: Iterable[Estimate]) -> list[Estimate]:
    """Layouts in the order in which to try them: those expected to be within 5 % of the fastest,
    the simplest first (of these the one with the most work in an operation, which the expected time
    knows nothing of), then the others by time."""
    by_time = sorted(found, key=lambda e: (e.expected.total, e.peak))
    most = by_time[0].expected.total * (1 + AS_GOOD) if by_time else 0.0
    good = [e for e in by_time if e.expected.total <= most]
    good.sort(key=lambda e: (e.complexity(), -e.work.micro_batch_size, e.expected.total))
    return good + by_time[len(good) :]


def _with(config: Config, micro_batch: int, **parallel: Any) -> Config | None:
    """The configuration in another layout, or None where that is refused."""
    tree = config.model_dump()
    tree["parallel"] |= parallel | {"pipeline_split": "balanced", "recompute_layers": 0}
    tree["training"]["micro_batch_size"] = micro_batch
    try:
        return parse_config(tree)
    except ConfigError:
        return None


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})
