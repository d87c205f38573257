"""`transxssm estimate`: the estimate of one layout, or the best layouts, in tables."""

import json

from rich.console import Console
from rich.table import Table

from parallel.flops import head_flops, layer_flops, training_flops_per_token
from parallel.roofline import COMPUTE_EFFICIENCY, GPUS, LINK_EFFICIENCY
from parallel.topology import AXES
from parallel.traffic import traffic
from pretrain.config import Config, ConfigError
from pretrain.console import warn, whole_console
from pretrain.estimate import (
    AS_GOOD,
    GIB,
    Estimate,
    Job,
    as_plain,
    best_first,
    estimate,
    layouts,
    overrides,
    utilization,
)
from pretrain.model_check import model_warnings, tokens_of_data

SHOWN = 10


def run(config: Config, job: Job, *, search: bool, as_json: bool) -> None:
    """Print the estimate, or the best layouts. Raises ConfigError when nothing fits."""
    console = whole_console()
    for warning in model_warnings(config.model, tokens_of_data(config)):
        warn(warning)
    if search:
        valid = list(layouts(config, job))
        if not valid:
            raise ConfigError(
                "no layout shares out this model and training.global_batch_size = "
                f"{config.training.global_batch_size} over {job.world_size} GPUs; give another "
                "number of GPUs, or another batch"
            )
        found = best_first(e for e in valid if e.peak <= job.usable)
        if as_json:
            print(json.dumps([as_plain(e, job) for e in found[:SHOWN]]))
        elif found:
            console.print(_layout_table(found[:SHOWN]))
            console.print(f"{len(found)} layouts fit {_gpus(job)}")
            console.print(
                f"take the first, the simplest within {AS_GOOD:.0%} of the fastest: "
                f"{overrides(found[0].config)}"
            )
        if not found:
            raise ConfigError(
                f"no layout of this model fits {_gpus(job)}; give more --nodes, or shorten "
                "data.seq_len"
            )
        return
    result = estimate(config, job)
    if as_json:
        print(json.dumps(as_plain(result, job)))
    else:
        _print(console, result, job)
    check_fits(result, job)


def check_fits(result: Estimate, job: Job) -> None:
    """Raises ConfigError when a rank needs more memory than its GPU has."""
    if result.peak > job.usable:
        stage = max(range(len(result.memory)), key=lambda s: result.memory[s].peak)
        largest = max(result.memory[stage].by_category().items(), key=_in_device_memory)
        raise ConfigError(
            f"a rank of stage {stage} needs {result.peak / GIB:.1f} GiB, most of it {largest[0]} "
            f"({largest[1] / GIB:.1f} GiB), and {job.usable / GIB:.1f} GiB of --gpu-memory "
            f"{job.gpu_memory / GIB:.1f} GiB are usable; see transxssm estimate --search for "
            "layouts that fit"
        )


def _gpus(job: Job) -> str:
    return f"{job.world_size} GPUs of {job.gpu_memory / GIB:.0f} GiB"


def _in_device_memory(category: tuple[str, int]) -> int:
    return 0 if category[0] == "host" else category[1]


def _print(console: Console, result: Estimate, job: Job) -> None:
    config, work = result.config, result.work
    model, parallel = config.model, config.parallel
    parameters = Table("parameters", "")
    for kind, count in model.num_params().items():
        parameters.add_row(kind, f"{count:,}")
    console.print(parameters)
    console.print(_flops_table(config))
    sizes = " × ".join(f"{axis} {getattr(result.top, axis)}" for axis in AXES)
    console.print(
        f"{job.world_size} GPUs: {sizes}; {work.micro_batches} micro-batches of "
        f"{work.micro_batch_size} × {work.seq_len} tokens a step; ZeRO {parallel.zero_stage}, "
        f"recompute {parallel.recompute}, {config.training.dtype}"
    )
    names = list(result.memory[0].by_category())
    memory = Table("GiB a rank", *(f"stage {s}" for s in range(len(result.memory))))
    for name in names:
        values = [stage.by_category()[name] for stage in result.memory]
        if any(values):
            memory.add_row(name, *(f"{value / GIB:,.3f}" for value in values))
    memory.add_row("peak", *(f"{stage.peak / GIB:,.3f}" for stage in result.memory))
    console.print(memory)
    volume = Table("axis", "ranks", "reaches", "GB sent by a rank a step", "seconds")
    stages = [traffic(model, parallel, work, s, result.chunks) for s in range(parallel.pipeline)]
    for axis in AXES:
        nodes = result.top.nodes_of_a_group(axis)
        volume.add_row(
            axis,
            str(getattr(result.top, axis)),
            "a node" if nodes == 1 else f"{nodes} nodes",
            f"{max(stage[axis] for stage in stages) / 1e9:,.3f}",
            f"{result.bound.communication[axis]:.4f}",
        )
    console.print(volume)
    console.print(f"pipeline bubble: {result.bubble:.1%} of a stage's time, of equal stages")
    if config.training.dtype != "bf16":
        console.print("step time: not predicted, peaks are those of bf16 products")
        return
    peaks = GPUS[job.gpu]
    console.print(
        f"peaks of {job.gpu}: {peaks.flops / 1e12:,.0f} TFLOP/s, memory {peaks.memory / 1e12:.2f} "
        f"TB/s, a node's links {peaks.node_link / 1e9:,.0f} GB/s, network "
        f"{peaks.network / 1e9:,.0f} GB/s"
    )
    console.print(_time_table(result, job))
    console.print(
        "bound: all at these peaks, nothing overlapped. Expected: computation at "
        f"{COMPUTE_EFFICIENCY:.0%} of its bound's rate, as three runs of 320M models on one H200 "
        f"were, links at {LINK_EFFICIENCY:.0%} (assumed), what overlaps left out"
    )


def _time_table(result: Estimate, job: Job) -> Table:
    table = Table("a step", "bound", "expected")
    times = (result.bound, result.expected)
    for part in ("compute", "bubble", "update", "total"):
        table.add_row(part, *(f"{getattr(time, part):.3f} s" for time in times))
        if part == "bubble":
            sums = (sum(time.communication.values()) for time in times)
            table.add_row("communication", *(f"{seconds:.3f} s" for seconds in sums))
    rates = [result.tokens_per_second(time) for time in times]
    table.add_row("tokens/s", *(f"{rate:,.0f}" for rate in rates))
    table.add_row("billion tokens a day", *(f"{rate * 86400 / 1e9:,.2f}" for rate in rates))
    shares = (utilization(result, job, time) for time in times)
    table.add_row("of the GPUs' FLOPs", *(f"{share:.0%}" for share in shares))
    days = (result.config.total_steps * time.total / 86400 for time in times)
    table.add_row("days of the run", *(f"{value:,.2f}" for value in days))
    return table


def _flops_table(config: Config) -> Table:
    """FLOPs per token, forward, by kind of layer."""
    model, seq_len = config.model, config.data.seq_len
    table = Table("FLOPs a token, forward", "each", "of them", "all")
    for name, attends in (("attention layer", True), ("SSD layer", False)):
        layers = [i for i in range(model.num_layers) if model.is_attention(i) == attends]
        if layers:
            each = layer_flops(model, layers[0], seq_len)
            table.add_row(name, f"{each:.4g}", str(len(layers)), f"{each * len(layers):.4g}")
    table.add_row("output head", f"{head_flops(model):.4g}", "1", f"{head_flops(model):.4g}")
    whole = training_flops_per_token(model, seq_len)
    table.add_row("forward and backward", "", "", f"{whole:.4g}")
    return table


def _layout_table(found: list[Estimate]) -> Table:
    table = Table(
        "layout", "micro-batch", "GiB", "bubble", "expected step s", "tokens/s", "bound s"
    )
    for result in found:
        table.add_row(
            _describe(result),
            str(result.work.micro_batch_size),
            f"{result.peak / GIB:.1f}",
            f"{result.bubble:.1%}",
            f"{result.expected.total:.3f}",
            f"{result.tokens_per_second(result.expected):,.0f}",
            f"{result.bound.total:.3f}",
        )
    return table


def _describe(result: Estimate) -> str:
    parallel = result.config.parallel
    return (
        f"tensor {parallel.tensor} context {parallel.context} data {result.work.data} pipeline "
        f"{parallel.pipeline}×{parallel.virtual_pipeline} ZeRO {parallel.zero_stage} recompute "
        f"{parallel.recompute}"
    )
