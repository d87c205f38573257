"""How fast TransXSSM trains and generates, against its rivals, in one process.

    python -m benchmarks.speed [--lengths 1024,2048,4096,8192,16384] [--dtypes bf16,fp32]
        [--intermediate 2048,4096] [--repeats 3] [--threads 1] [--folder runs/speed] [--quick]

A training step is forward, backward and AdamW's update of one sequence. Of large models it is the
sum of its parts, each measured: every kind of decoder layer, the output head with its loss, the
update of a weight. Models of 8 layers are also run whole, and beside Hugging Face's Llama and Bamba
(attention and Mamba-2) of the same size; so is generation at batch 1 after a long context. All
rivals have as many parameters (benchmarks.rivals). Attention is PyTorch's SDPA.

Calls take turns, after a warm-up; medians, and the spread of the turns' ratios. Process time with
one CPU thread, wall time with more, events on a GPU. What has been measured is remembered in the
folder: run it again after a kill.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rivals import ATTENTION, RIVALS, TRANSXSSM, Rival, rival_model
from benchmarks.timing import in_turns
from parallel.config import ModelConfig
from parallel.flops import head_flops, layer_flops

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_TOKENS = 1024  # a head's time is measured on so many, and is the same for each
WHOLE_LAYERS = 8
HUGGING_FACE_TOKENS = 1024
# What is claimed of one CPU thread: dtype, intermediate_size → rate over attention's at 4,096
TRAINING_BOUNDS = {("bf16", 2048): 1.45, ("fp32", 2048): 1.33, ("bf16", 4096): 1.33}
LONG_BOUND = 2.5  # at 16,384
GENERATION_BOUND = 1.30
HUGGING_FACE_BOUND = 3.0
PRODUCTS_BOUND = 0.70


@dataclass(frozen=True)
class Problem:
    """A length, a dtype, a width of the feed-forward."""

    dtype: str
    length: int
    intermediate: int

    @property
    def key(self) -> str:
        """Of what is remembered."""
        return f"{self.dtype} {self.length} {self.intermediate}"

    def model(self, layers: int) -> ModelConfig:
        """The published default: hidden 1024, 8 heads of 128, no groups shared."""
        return ModelConfig(
            vocab_size=32768,
            hidden_size=1024,
            intermediate_size=self.intermediate,
            num_layers=layers,
            num_heads=8,
            num_kv_heads=8,
            head_dim=128,
            state_dim=128,
            ssd_groups=8,
            max_position_embeddings=max(self.length, 4096),
        )


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join() -> None:
    """A job of this process alone."""
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import Launch

    init_distributed(Launch(0, 1, 0), prepare_host())
    init_groups(ParallelConfig())


def stage(model: ModelConfig, problem: Problem) -> Any:
    """The model as training has it."""
    from parallel.build import build_stage
    from parallel.config import ParallelConfig

    built = build_stage(
        model,
        ParallelConfig(),
        seq_len=problem.length,
        dtype=DTYPES[problem.dtype],
        seed=0,
        deterministic=False,
        device=device(),
    )
    return built.chunks[0]


# -- layers ----------------------------------------------------------------------------------------


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


def measure_layers(problem: Problem, layers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds, forward and backward of one sequence, of every kind of layer; of the head a token,
    of the update a weight; and of the matrix products of both kinds of layers, alone."""
    calls: dict[str, Callable[[], object]] = {}
    for model in rival_models(problem, layers).values():
        for layer in range(layers):
            if (name := kind(model, layer)) not in calls:
                calls[name] = layer_call(model, layer, problem)
    calls["products of attention"] = products_call(problem, attention=True)
    calls["products of SSD"] = products_call(problem, attention=False)
    head, update = head_call(problem), update_call(problem)
    found = in_turns(calls, device(), repeats)
    found |= in_turns({"head": head, "update": update[0]}, device(), repeats)
    seconds = {name: list(times.seconds) for name, times in found.items()}
    seconds["head"] = [s / HEAD_TOKENS for s in seconds["head"]]
    seconds["update"] = [s / update[1] for s in seconds["update"]]
    return seconds


def layer_call(model: ModelConfig, layer: int, problem: Problem) -> Callable[[], object]:
    """Forward and backward of a decoder layer by itself."""
    attends = model.is_attention(layer)
    alone = model.model_dump() | {
        "num_layers": 1,
        "attn_layer_period": 1,
        "attn_layer_offset": 0 if attends else 1,
        "vocab_size": 128,
    }
    module = stage(ModelConfig.model_validate(alone), problem)
    where, length = device(), problem.length
    position_ids = torch.arange(length, dtype=torch.int32, device=where)[None]
    borders = torch.tensor([0, length], dtype=torch.int32, device=where)
    positions = module.positions(position_ids, borders, None)
    h = torch.randn(length, 1, model.hidden_size, device=where).to(DTYPES[problem.dtype])
    h.requires_grad_()
    grad = torch.randn_like(h)
    weights = [p for p in module.model.layers.parameters() if p.requires_grad]
    run = module.model.layers["0"]
    return lambda: torch.autograd.grad(run(h, positions), [h, *weights], grad)


def products_call(problem: Problem, *, attention: bool) -> Callable[[], object]:
    """The matrix products of a layer's projections, forward and backward, and of its scan or causal
    attention as full products would have them."""
    model, where, dtype = problem.model(8), device(), DTYPES[problem.dtype]
    hidden, width = model.hidden_size, model.num_heads * model.head_dim
    shapes = [(hidden, width)] * 3 + [(width, hidden)]  # q k v o, or x b c out
    shapes += [(hidden, model.intermediate_size)] * 2 + [(model.intermediate_size, hidden)]
    pairs = []
    for inputs, outputs in shapes:
        x = torch.randn(problem.length, inputs, device=where).to(dtype)
        w = torch.randn(outputs, inputs, device=where).to(dtype)
        y = torch.randn(problem.length, outputs, device=where).to(dtype)
        pairs.append((x, w, y))
    heads = (model.num_heads, problem.length, model.head_dim)
    q, k = (torch.randn(heads, device=where).to(dtype) for _ in range(2))
    chunk = 64

    def mixer() -> None:
        if attention:  # causal: half of each of 2 products forward and 4 backward
            blocks = 512
            for at in range(0, problem.length, blocks):
                rows = q[:, at : at + blocks]
                for _ in range(3):
                    (rows @ k[:, : at + blocks].mT) @ k[:, : at + blocks]
        else:  # within chunks 2 products forward and 4 backward; states as many of P × N
            a = q.reshape(-1, chunk, model.head_dim)
            b = k.reshape(-1, chunk, model.head_dim)
            for _ in range(3):
                (a @ b.mT) @ b
                a @ (a.mT @ b)

    def call() -> None:
        for x, w, y in pairs:
            x @ w.T, y @ w, y.T @ x
        mixer()

    return call


def head_call(problem: Problem) -> Callable[[], object]:
    """Forward and backward of the output head and its loss, over HEAD_TOKENS tokens."""
    from parallel.loss import head_loss

    model, where = problem.model(8), device()
    h = torch.randn(HEAD_TOKENS, model.hidden_size, device=where).to(DTYPES[problem.dtype])
    weight = 0.02 * torch.randn(model.vocab_size, model.hidden_size, device=where)
    weight = weight.to(DTYPES[problem.dtype])
    labels = torch.randint(model.vocab_size, (HEAD_TOKENS,), device=where)
    mask = torch.ones(HEAD_TOKENS, device=where)

    def call() -> None:
        a, b = h.detach().requires_grad_(), weight.detach().requires_grad_()
        head_loss(a, b, labels, mask, model.vocab_size)[0].backward()

    return call


def update_call(problem: Problem) -> tuple[Callable[[], object], int]:
    """AdamW on float32 weights, and how many they are."""
    weight = torch.nn.Parameter(torch.zeros(1 << 24, device=device()))
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.AdamW([weight], fused=weight.is_cuda)
    return adam.step, weight.numel()


def step_seconds(
    model: ModelConfig, problem: Problem, seconds: dict[str, list[float]], turn: int | None = None
) -> float:
    """Of a training step, from the parts: their medians, or those of one turn."""

    def of(name: str) -> float:
        return statistics.median(seconds[name]) if turn is None else seconds[name][turn]

    layers = sum(of(kind(model, layer)) for layer in range(model.num_layers))
    return layers + of("head") * problem.length + of("update") * model.num_params()["total"]


def step_flops(model: ModelConfig, problem: Problem) -> float:
    """Model FLOPs of a training step."""
    layers = sum(layer_flops(model, i, problem.length) for i in range(model.num_layers))
    return 3 * problem.length * (layers + head_flops(model))


def peak_flops(dtype: str, repeats: int) -> float:
    """This machine's matrix products a second, the best of some sizes."""
    best = 0.0
    for size in (1024, 2048) if device().type == "cpu" else (8192,):
        a, b = (torch.randn(size, size, device=device()).to(DTYPES[dtype]) for _ in range(2))
        times = in_turns({"": lambda a=a, b=b: a @ b}, device(), repeats)  # type: ignore[misc]
        best = max(best, 2 * size**3 / min(times[""].seconds))
    return best


# -- whole models ----------------------------------------------------------------------------------


def measure_whole(problem: Problem, repeats: int) -> dict[str, list[float]]:
    """Training steps of 8 layers, whole."""
    calls = {
        rival.name: step_call(rival_model(rival, problem.model(WHOLE_LAYERS)), problem)
        for rival in (TRANSXSSM, ATTENTION)
    }
    return {n: list(t.seconds) for n, t in in_turns(calls, device(), repeats).items()}


def step_call(model: ModelConfig, problem: Problem) -> Callable[[], object]:
    """Forward, backward and update."""
    module = stage(model, problem)
    adam = torch.optim.AdamW(module.parameters(), fused=device().type == "cuda")
    tokens = torch.randint(model.vocab_size, (1, problem.length + 1), device=device())
    borders = torch.tensor([0, problem.length], dtype=torch.int32, device=device())
    position_ids = torch.arange(problem.length, dtype=torch.int32, device=device())[None]
    mask = torch.full((1, problem.length), 1 / problem.length, device=device())

    def call() -> None:
        loss, _ = module(tokens[:, :-1], tokens[:, 1:], mask, position_ids, borders)
        loss.backward()
        adam.step()
        adam.zero_grad()

    return call


def measure_hugging_face(problem: Problem, repeats: int) -> dict[str, list[float]]:
    """Training steps of our hybrid, and of transformers' models of its size."""
    from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = problem.model(WHOLE_LAYERS)
    sizes: dict[str, Any] = {
        "vocab_size": model.vocab_size, "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
        "tie_word_embeddings": True, "max_position_embeddings": model.max_position_embeddings,
    }  # fmt: skip
    mamba: dict[str, Any] = {
        "attn_layer_indices": [i for i in range(model.num_layers) if model.is_attention(i)],
        "mamba_n_heads": model.num_heads, "mamba_d_head": model.head_dim, "mamba_expand": 1,
        "mamba_n_groups": model.ssd_groups, "mamba_d_state": model.state_dim,
        "mamba_chunk_size": 256,
    }  # fmt: skip
    calls = {TRANSXSSM.name: step_call(model, problem)}
    for name, made in (
        ("transformers Llama, SDPA", LlamaForCausalLM(LlamaConfig(**sizes))),
        ("transformers Bamba (Mamba-2 hybrid)", BambaForCausalLM(BambaConfig(**sizes, **mamba))),
    ):
        calls[name] = hugging_face_call(made, problem)
    return {n: list(t.seconds) for n, t in in_turns(calls, device(), repeats).items()}


def hugging_face_call(model: Any, problem: Problem) -> Callable[[], object]:
    """The same step."""
    model = model.to(device(), DTYPES[problem.dtype])
    adam = torch.optim.AdamW(model.parameters(), fused=device().type == "cuda")
    tokens = torch.randint(model.config.vocab_size, (1, problem.length), device=device())

    def call() -> None:
        model(tokens, labels=tokens).loss.backward()
        adam.step()
        adam.zero_grad()

    return call


def measure_generation(problem: Problem, repeats: int) -> dict[str, list[float]]:
    """A token at batch 1 after problem.length of context, by the single-GPU model."""
    calls = {rival.name: generation_call(rival, problem) for rival in (TRANSXSSM, ATTENTION)}
    found = in_turns(calls, device(), repeats)
    return {name: [s / GENERATED for s in times.seconds] for name, times in found.items()}


GENERATED = 16


def generation_call(rival: Rival, problem: Problem) -> Callable[[], object]:
    """GENERATED tokens, greedily; the context is what it was, as far as time goes."""
    from checkpoints_tools.single_gpu import Cache, TransXSSM
    from checkpoints_tools.source import single_gpu_config

    model = rival_model(rival, problem.model(WHOLE_LAYERS))
    state = {"config": {"model": model.model_dump()}, "eod_id": 0, "pad_id": 0}
    single = TransXSSM(single_gpu_config(state, problem.dtype))
    single = single.to(device(), DTYPES[problem.dtype]).eval()
    cache = Cache(single.config)
    with torch.no_grad():
        context = torch.randint(model.vocab_size, (1, problem.length), device=device())
        single.hidden(context, cache)

    @torch.no_grad()
    def call() -> None:
        token = context[:, -1:]
        for _ in range(GENERATED):
            logits: Tensor = single.logits(single.hidden(token, cache)[:, -1])
            token = logits.argmax(-1, keepdim=True)

    return call


# -- what is printed -------------------------------------------------------------------------------


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
        title=f"training, {problem.dtype}, {problem.length:,} tokens, hidden 1024, "
        f"feed-forward {problem.intermediate}, {layers} layers and a head of 32,768"
    )
    for column in (
        "",
        "parameters",
        "s a step",
        "tokens/s",
        "GFLOP/s",
        "of peak",
        "over attention",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for name, model in models.items():
        step = step_seconds(model, problem, seconds)
        rate = step_flops(model, problem) / step
        table.add_row(
            name, f"{model.num_params()['total'] / 1e6:.1f} M", f"{step:.1f}",
            f"{problem.length / step:,.0f}", f"{rate / 1e9:,.0f}", f"{rate / peak:.0%}",
            shown(training_ratio(problem, layers, seconds, name)),
        )  # fmt: skip
    console.print(table)
    parts = ", ".join(
        f"{name} {statistics.median(s):.3f}"
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


class Remembered:
    """Measurements by name, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured, or is now."""
        if name not in self.found:
            print(f"{name} ...", file=sys.stderr, flush=True)
            self.found[name] = measure()
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.found))
            os.replace(temporary, self.path)
        return self.found[name]


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    intermediate: tuple[int, ...]
    repeats: int
    layers: int
    threads: int


def run(options: Options, folder: Path, console: Console) -> int:
    """Measure, print, draw; 1 if a bound is missed."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    join()
    folder.mkdir(parents=True, exist_ok=True)
    setting = {"torch": torch.__version__, "device": device_name(), **asdict(options)}
    setting = {name: setting[name] for name in ("torch", "device", "threads", "repeats")}
    remembered = Remembered(folder / "results.json")
    if remembered.get("setting", lambda: setting) != setting:
        console.print(f"{folder} holds measurements of {remembered.found['setting']}; use another")
        return 2
    verdicts: list[tuple[bool, str]] = []
    curves: dict[str, dict[int, tuple[float, float, float]]] = {}
    repeats, layers = options.repeats, options.layers
    for dtype in options.dtypes:
        peak = remembered.get(f"peak {dtype}", partial(peak_flops, dtype, repeats))
        console.print(f"{dtype}: matrix products at {peak / 1e9:,.0f} GFLOP/s, {device_name()}")
        for intermediate in options.intermediate:
            # other widths of the feed-forward at one length
            lengths = options.lengths if intermediate == options.intermediate[0] else (4096,)
            for length in lengths:
                problem = Problem(dtype, length, intermediate)
                seconds = remembered.get(
                    f"layers {problem.key}",
                    partial(measure_layers, problem, layers, repeats),
                )
                print_training(console, problem, layers, seconds, peak)
                ratio = training_ratio(problem, layers, seconds, TRANSXSSM.name)
                curves.setdefault(f"{dtype}, feed-forward {intermediate}", {})[length] = ratio
                verdicts += judge_training(problem, ratio, seconds)
        verdicts += whole(console, remembered, dtype, options)
    draw(curves, folder / "speed.png")
    console.print(f"picture: {folder / 'speed.png'}")
    if device().type == "cuda" or options.threads > 1:
        return 0
    for met, said in verdicts:
        console.print(f"{'met   ' if met else 'MISSED'} {said}")
    return 0 if all(met for met, _ in verdicts) else 1


def whole(
    console: Console, remembered: Remembered, dtype: str, options: Options
) -> list[tuple[bool, str]]:
    """Whole models and generation."""
    problem = Problem(dtype, max(n for n in options.lengths if n <= 4096), options.intermediate[0])
    repeats, verdicts = options.repeats, []
    trained = remembered.get(f"whole {problem.key}", lambda: measure_whole(problem, repeats))
    ratio = ratios(trained[ATTENTION.name], trained[TRANSXSSM.name])
    console.print(
        f"{dtype}, {WHOLE_LAYERS} layers whole, {problem.length:,} tokens: "
        f"{statistics.median(trained[TRANSXSSM.name]):.1f} s a step, {shown(ratio)} the rate of "
        "attention"
    )
    generated = remembered.get(
        f"generation {problem.key}", lambda: measure_generation(problem, repeats)
    )
    ratio = ratios(generated[ATTENTION.name], generated[TRANSXSSM.name])
    said = (
        f"{dtype}: generates at batch 1 after {problem.length:,} tokens at "
        f"{1 / statistics.median(generated[TRANSXSSM.name]):.1f} tokens/s, {shown(ratio)} attention"
    )
    verdicts.append((ratio[0] >= GENERATION_BOUND, f"{said} (bound {GENERATION_BOUND:.2f}×)"))
    problem = Problem(dtype, HUGGING_FACE_TOKENS, options.intermediate[0])
    theirs = remembered.get(
        f"transformers {problem.key}", lambda: measure_hugging_face(problem, repeats)
    )
    for name, seconds in theirs.items():
        if name == TRANSXSSM.name:
            continue
        ratio = ratios(seconds, theirs[TRANSXSSM.name])
        said = f"{dtype}, {problem.length:,} tokens: trains at {shown(ratio)} the rate of {name}"
        bound = HUGGING_FACE_BOUND if "Bamba" in name else 0.0
        verdicts.append((ratio[0] >= bound, said + (f" (bound {bound:g}×)" if bound else "")))
    return verdicts


def judge_training(
    problem: Problem, ratio: tuple[float, float, float], seconds: dict[str, list[float]]
) -> list[tuple[bool, str]]:
    """Of what is claimed at this length."""
    verdicts = []
    said = (
        f"{problem.dtype} {problem.length:,}, feed-forward {problem.intermediate}: trains at "
        f"{shown(ratio)} the rate of attention"
    )
    bound = TRAINING_BOUNDS.get((problem.dtype, problem.intermediate), 0.0)
    if problem.length == 4096 and bound:
        verdicts.append((ratio[0] >= bound, f"{said} (bound {bound:.2f}×)"))
        share = products_share(problem, seconds)
        said = f"{problem.dtype}: matrix products alone take {share:.0%} of the layers' time"
        verdicts.append((share >= PRODUCTS_BOUND, f"{said} (bound {PRODUCTS_BOUND:.0%})"))
    elif problem.length == 16384:
        verdicts.append((ratio[0] >= LONG_BOUND, f"{said} (bound {LONG_BOUND:.2f}×)"))
    return verdicts


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


def numbers(text: str) -> tuple[int, ...]:
    """Of a list with commas."""
    return tuple(int(part) for part in text.split(","))


def main(arguments: list[str]) -> int:
    """Parse and run; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.speed")
    parser.add_argument("--lengths", type=numbers, default=(1024, 2048, 4096, 8192, 16384))
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--intermediate", type=numbers, default=(2048, 4096))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"))
    parser.add_argument("--quick", action="store_true", help="bf16, 1,024 tokens, 2 repeats")
    given = parser.parse_args(arguments)
    if bad := sorted(set(given.dtypes.split(",")) - DTYPES.keys()):
        parser.error(f"--dtypes: {bad}; expected {' or '.join(DTYPES)}")
    if min(*given.lengths, 1 << 30) < 64 or min(given.repeats, given.threads, given.layers) < 1:
        parser.error("lengths of 64 tokens or more; repeats, threads and layers of 1 or more")
    options = Options(
        (1024,) if given.quick else tuple(sorted(given.lengths)),
        ("bf16",) if given.quick else tuple(given.dtypes.split(",")),
        given.intermediate[:1] if given.quick else given.intermediate,
        2 if given.quick else given.repeats,
        given.layers,
        given.threads,
    )
    folder = given.folder / "quick" if given.quick else given.folder
    return run(options, folder, Console(highlight=False, width=130))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
