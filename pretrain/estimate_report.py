"""`transxssm estimate`: the estimate of one layout, or the best layouts, in tables."""

import json

from rich.console import Console
from rich.table import Table

from parallel.flops import head_flops, layer_flops, training_flops_per_token
from parallel.topology import AXES
from parallel.traffic import traffic
from pretrain.config import Config, ConfigError
from pretrain.console import whole_console
from pretrain.estimate import (
    GIB,
    Estimate,
    Job,
    as_plain,
    estimate,
    layouts,
    overrides,
    utilization,
)

SHOWN = 10


def run(config: Config, job: Job, *, search: bool, as_json: bool) -> None:
    """Print the estimate, or the best layouts. Raises ConfigError when nothing fits."""
    console = whole_console()
    if search:
        found = sorted(
            (e for e in layouts(config, job) if e.peak <= job.usable),
            key=lambda e: (e.time.total, e.peak),
        )
        if as_json:
            print(json.dumps([as_plain(e, job) for e in found[:SHOWN]]))
        elif found:
            console.print(_layout_table(found[:SHOWN]))
            console.print(f"{len(found)} layouts fit {_gpus(job)}")
            console.print(f"take the first: {overrides(found[0].config)}")
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
            f"{result.time.communication[axis]:.4f}",
        )
    console.print(volume)
    console.print(f"pipeline bubble: {result.bubble:.1%} of a stage's time, of equal stages")
    if config.training.dtype != "bf16":
        console.print("step time: not predicted, peaks are those of bf16 products")
        return
    time = result.time
    console.print(
        f"step, at least: {time.total:.3f} s = compute {time.compute:.3f} + bubble "
        f"{time.bubble:.3f} + communication {sum(time.communication.values()):.3f} + update "
        f"{time.update:.3f}, on {job.gpu} at its peaks, nothing overlapped"
    )
    day = result.tokens_per_second * 86400
    console.print(
        f"at most {result.tokens_per_second:,.0f} tokens/s, {day / 1e9:,.2f} billion a day, "
        f"{utilization(result, job):.0%} of the GPUs' FLOPs; the run: "
        f"{config.total_steps * time.total / 86400:,.2f} days at least"
    )


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
    table = Table("layout", "micro-batch", "GiB", "bubble", "step s", "tokens/s")
    for result in found:
        table.add_row(
            _describe(result),
            str(result.work.micro_batch_size),
            f"{result.peak / GIB:.1f}",
            f"{result.bubble:.1%}",
            f"{result.time.total:.3f}",
            f"{result.tokens_per_second:,.0f}",
        )
    return table


def _describe(result: Estimate) -> str:
    parallel = result.config.parallel
    return (
        f"tensor {parallel.tensor} context {parallel.context} data {result.work.data} pipeline "
        f"{parallel.pipeline}×{parallel.virtual_pipeline} ZeRO {parallel.zero_stage} recompute "
        f"{parallel.recompute}"
    )
