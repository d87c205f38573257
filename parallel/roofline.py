"""A step's time: a bound, with every resource at its peak, and what is to be expected.

A layer's time is its FLOPs at the GPU's dense peak plus the traffic of what it keeps for backward
at the memory's peak (written once and read twice, its gradient written and read: five times).
Communication adds its bytes at the link's peak. A pipeline of p stages of v chunks takes m
micro-batches in (m + (p - 1) / v) times its slowest stage.

Peaks are the vendor's (NVIDIA's A100, H100, H200 and B200 datasheets: SXM, bf16 without sparsity,
NVLink in one direction); the network is taken as one 400 Gb/s port a GPU (200 Gb/s beside an A100),
a rank's share of its host's memory, where an offloaded optimizer works, as 50 GB/s.

The bound lets nothing overlap. What is expected divides it by efficiencies and leaves out the
communication that goes on beside products (`expected_time`).
"""

from dataclasses import dataclass, replace

from parallel.config import ModelConfig, ParallelConfig
from parallel.flops import head_flops, layer_flops
from parallel.footprint import Workload, layer_activations
from parallel.memory import stage_parameters
from parallel.topology import Axis, Topology
from parallel.traffic import traffic

KEPT_TENSOR_PASSES = 5
HOST_MEMORY = 50e9  # bytes a second, assumed
# Share of the bound's rate that was reached: 0.51, 0.47 and 0.47 by configs/320m.toml at 1,024 and
# 4,096 tokens and its attention rival at 4,096, on one H200 (docs/gpu.md); their mean
COMPUTE_EFFICIENCY = 0.48
LINK_EFFICIENCY = 0.8  # of a link's peak, assumed: nothing has run on several GPUs
UPDATE_BYTES = 4 * (3 + 3 + 1)  # Adam reads and writes weight and moments, and reads a gradient


@dataclass(frozen=True)
class GPU:
    """Peaks, per second."""

    flops: float
    memory: float
    node_link: float
    network: float


GPUS = {
    "a100": GPU(312e12, 2.039e12, 300e9, 25e9),
    "h100": GPU(989e12, 3.35e12, 450e9, 50e9),
    "h200": GPU(989e12, 4.8e12, 450e9, 50e9),
    "b200": GPU(2250e12, 8e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's parts, on the slowest stage."""

    compute: float
    bubble: float
    communication: dict[Axis, float]
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.bubble + sum(self.communication.values()) + self.update


def bubble_share(pipeline: int, virtual: int, micro_batches: int) -> float:
    """Idle share of a pipeline of equal stages: (p - 1) / (v m + p - 1) (arXiv 2104.04473)."""
    return (pipeline - 1) / (virtual * micro_batches + pipeline - 1)


def layer_seconds(
    model: ModelConfig,
    parallel: ParallelConfig,
    work: Workload,
    layer: int,
    recompute: str,
    gpu: GPU,
) -> float:
    """Forward and backward of one layer for one micro-batch, recomputation included."""
    tokens = work.tokens(parallel)
    flops = layer_flops(model, layer, work.seq_len) * tokens / parallel.tensor
    bytes_kept = layer_activations(model, parallel, work, layer, selective=False)
    passes = KEPT_TENSOR_PASSES + 2 * (recompute != "none")
    return (3 + (recompute == "full")) * flops / gpu.flops + passes * bytes_kept / gpu.memory


def stage_seconds(
    model: ModelConfig,
    parallel: ParallelConfig,
    work: Workload,
    chunks: list[range],
    gpu: GPU,
) -> list[float]:
    """Forward and backward of one micro-batch on every stage."""
    head = 3 * head_flops(model) * work.tokens(parallel) / parallel.tensor / gpu.flops
    stages = [
        sum(
            layer_seconds(model, parallel, work, layer, parallel.recompute_of(n), gpu)
            for chunk in chunks[stage :: parallel.pipeline]
            for n, layer in enumerate(chunk)
        )
        for stage in range(parallel.pipeline)
    ]
    stages[-1] += head
    return stages


def step_time(
    model: ModelConfig,
    parallel: ParallelConfig,
    work: Workload,
    chunks: list[range],
    gpu: GPU,
    top: Topology,
) -> StepTime:
    """Of one training step, by its slowest stage."""
    slowest = max(stage_seconds(model, parallel, work, chunks, gpu))
    compute = work.micro_batches * slowest
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline * slowest
    seconds = {}
    stages = [traffic(model, parallel, work, s, chunks) for s in range(parallel.pipeline)]
    for axis in stages[0]:
        link = gpu.node_link if top.nodes_of_a_group(axis) == 1 else gpu.network
        seconds[axis] = max(stage[axis] for stage in stages) / link
    numel = max(stage_parameters(model, parallel, s, chunks) for s in range(parallel.pipeline))
    memory = gpu.memory if parallel.offload == "none" else HOST_MEMORY
    update = UPDATE_BYTES * numel / work.shards(parallel) / memory
    return StepTime(compute, bubble, seconds, update)


def expected_time(bound: StepTime, parallel: ParallelConfig) -> StepTime:
    """What a step is to be expected to take, by its bound.

    Computation and update at COMPUTE_EFFICIENCY, communication at LINK_EFFICIENCY and only as far
    as nothing hides it: under sequence parallelism backward gathers and scatters tokens beside
    products; interleaved stages send beside other chunks; ZeRO 2 and 3 reduce gradients, and gather
    parameters, beside two thirds of the computation, backward.
    """
    compute = bound.compute / COMPUTE_EFFICIENCY
    seconds = {axis: time / LINK_EFFICIENCY for axis, time in bound.communication.items()}
    if parallel.sequence_parallel:
        # of two and a half passes (three and a half with recomputation), see parallel.traffic
        passes = 2.5 + (parallel.recompute == "full")
        seconds["tensor"] *= 1 - 1 / passes
    if parallel.virtual_pipeline > 1:
        seconds["pipeline"] = 0.0
    if parallel.zero_stage >= 2:
        seconds["data"] = max(0.0, seconds["data"] - compute * 2 / 3)
    return replace(
        bound,
        compute=compute,
        bubble=bound.bubble / COMPUTE_EFFICIENCY,
        communication=seconds,
        update=bound.update / COMPUTE_EFFICIENCY,
    )
