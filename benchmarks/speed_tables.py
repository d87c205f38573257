"""How benchmarks.speed adds up, prints and draws what it has measured."""

import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rivals import ATTENTION, RIVALS, rival_model
from benchmarks.speed_calls import Problem, device
from parallel.config import ModelConfig
from parallel.flops import head_flops, layer_flops


def kind(model: ModelConfig, layer: int) -> str:
    """What a layer's time depends on, besides its feed-forward's width."""
    if model.is_attention(layer):
        return "attention" if model.rope != "none" else "attention, no RoPE"
    if model.ssd_conv_width:
        return "SSD, convolution"
    return "SSD" if model.rope == "unified" else "SSD, no RoPE"


def rival_models(problem: Problem, layers: int) -> dict[str, ModelConfig]:
    """Of all rivals, by name."""
    return {rival.name: rival_model(rival, problem.model(layers)) for rival in RIVALS}


def step_seconds(
    model: ModelConfig, problem: Problem, seconds: dict[str, list[float]], turn: int | None = None
) -> float:
    """Of a training step, from the parts: their medians, or those of one turn."""

    def of(name: str) -> float:
        return statistics.median(seconds[name]) if turn is None else seconds[name][turn]

    layers = sum(of(kind(model, layer)) for layer in range(model.num_layers))
    return layers + of("head") * problem.tokens + of("update") * model.num_params()["total"]


def step_flops(model: ModelConfig, problem: Problem) -> float:
    """Model FLOPs of a training step."""
    layers = sum(layer_flops(model, i, problem.length) for i in range(model.num_layers))
    return 3 * problem.tokens * (layers + head_flops(model))


def ratios(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Of medians, and the least and largest of a turn."""
    by_turn = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(slow) / statistics.median(fast), min(by_turn), max(by_turn)


def shown(ratio: tuple[float, float, float]) -> str:
    """1.52× [1.50–1.55]."""
    return f"{ratio[0]:.2f}× [{ratio[1]:.2f}–{ratio[2]:.2f}]"


def training_ratio(
    problem: Problem, layers: int, seconds: dict[str, list[float]], rival: str
) -> tuple[float, float, float]:
    """A rival's rate over attention's."""
    models = rival_models(problem, layers)
    turns = range(len(seconds["head"]))
    attention, own = (
        [step_seconds(models[name], problem, seconds, turn) for turn in turns]
        for name in (ATTENTION.name, rival)
    )
    ratio = step_seconds(models[ATTENTION.name], problem, seconds)
    _, low, high = ratios(attention, own)
    return ratio / step_seconds(models[rival], problem, seconds), low, high


def print_training(
    console: Console, problem: Problem, layers: int, seconds: dict[str, list[float]], peak: float
) -> None:
    """A table of all rivals."""
    models = rival_models(problem, layers)
    table = Table(
        title=f"training, {problem.dtype}, {problem.sequences} × {problem.length:,} tokens, "
        f"hidden 1024, feed-forward {problem.intermediate}, {layers} layers, "
        f"head of {1024 * layers:,}"
    )
    for column in (
        "",
        "parameters",
        "s a step",
        "tokens/s",
        "TFLOP/s",
        "of peak",
        "over attention",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for name, model in models.items():
        step = step_seconds(model, problem, seconds)
        rate = step_flops(model, problem) / step
        table.add_row(
            name, f"{model.num_params()['total'] / 1e6:.1f} M", f"{step:.3g}",
            f"{problem.tokens / step:,.0f}", f"{rate / 1e12:,.3g}", f"{rate / peak:.0%}",
            shown(training_ratio(problem, layers, seconds, name)),
        )  # fmt: skip
    console.print(table)
    parts = ", ".join(
        f"{name} {statistics.median(s):.3g}"
        for name, s in seconds.items()
        if name not in ("head", "update")
    )
    console.print(f"seconds, forward and backward: {parts}")


def products_share(problem: Problem, seconds: dict[str, list[float]]) -> float:
    """Of TransXSSM's layers' time: what their matrix products alone take."""
    model = problem.model(8)
    kinds = ["attention" if model.is_attention(i) else "SSD" for i in range(8)]
    alone = sum(statistics.median(seconds[f"products of {kind}"]) for kind in kinds)
    return alone / sum(statistics.median(seconds[kind]) for kind in kinds)


def draw(curves: dict[str, dict[int, tuple[float, float, float]]], path: Path) -> None:
    """The rate over attention's by length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        lengths = sorted(curve)
        middle = [curve[n][0] for n in lengths]
        # the ratio of medians may lie outside the turns' ratios
        below = [max(0.0, curve[n][0] - curve[n][1]) for n in lengths]
        above = [max(0.0, curve[n][2] - curve[n][0]) for n in lengths]
        spread = [below, above]
        axis.errorbar(lengths, middle, yerr=spread, marker="o", capsize=3, label=name)
    axis.axhline(1, color="grey", lw=1)
    axis.set_xscale("log", base=2)
    ticks = sorted({length for curve in curves.values() for length in curve})
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.set_xlabel("tokens of a sequence")
    axis.set_ylabel("training rate, attention = 1")
    axis.set_title(f"TransXSSM against as large an attention model, {device_name()}", fontsize=10)
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def device_name() -> str:
    """Of the GPU, or of the CPU and its threads."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} thread(s)"
    return "CPU"
