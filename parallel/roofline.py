"""A lower bound of a step's time: every resource at its peak, nothing overlapped.

A layer's time is its FLOPs at the GPU's dense peak plus the traffic of what it keeps for backward
at the memory's peak (written once and read twice, its gradient written and read: five times).
Communication adds its bytes at the link's peak. A pipeline of p stages of v chunks takes m
micro-batches in (m + (p - 1) / v) times its slowest stage.

Peaks are the vendor's (NVIDIA's A100, H100, H200 and B200 datasheets: SXM, bf16 without sparsity,
NVLink in one direction); the network is taken as one 400 Gb/s port a GPU (200 Gb/s beside an A100),
a rank's share of its host's memory, where an offloaded optimizer works, as 50 GB/s.
Measured runs are slower; what the figures are for is comparing layouts.
"""

from dataclasses import dataclass

from parallel.config import ModelConfig, ParallelConfig
from parallel.flops import head_flops, layer_flops
from parallel.footprint import Workload, layer_activations
from parallel.memory import stage_parameters
from parallel.topology import Axis, Topology
from parallel.traffic import traffic

KEPT_TENSOR_PASSES = 5
HOST_MEMORY = 50e9  # bytes a second, assumed
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
