"""How fast TransXSSM trains and generates, against its rivals, in one process.

    python -m benchmarks.speed [--lengths 1024,2048,4096,8192,16384] [--dtypes bf16,fp32]
        [--intermediate 2048,4096] [--repeats 3] [--threads 1] [--folder runs/speed] [--quick]

A training step is forward, backward and AdamW's update of one sequence. Of large models it is the
sum of its parts, each measured: every kind of decoder layer, the output head with its loss, the
update of a weight. Models of 8 layers are also run whole, and beside Hugging Face's Llama and Bamba
(attention and Mamba-2) of the same size; so is generation at batch 1 after a long context. All
rivals have as many parameters (benchmarks.rivals). Attention is PyTorch's SDPA. A vocabulary has
1,024 tokens a layer, so that the head's share of a step is the same in models of all depths. A GPU
gets 32,768 tokens a step, and Hugging Face's models 2 sequences, since their Bamba without its
kernels needs the memory.

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

from benchmarks.rivals import ATTENTION, TRANSXSSM, rival_model
from benchmarks.speed_calls import (
    DTYPES,
    GENERATED,
    WHOLE_LAYERS,
    Problem,
    device,
    generation_call,
    head_call,
    hugging_face_call,
    join,
    layer_call,
    products_call,
    step_call,
    update_call,
)
from benchmarks.speed_tables import (
    device_name,
    draw,
    kind,
    print_training,
    products_share,
    ratios,
    rival_models,
    shown,
    training_ratio,
)
from benchmarks.timing import in_turns

HUGGING_FACE_TOKENS = 1024
GPU_TOKENS = 32768  # of a step
# What is claimed of one CPU thread: dtype, intermediate_size → rate over attention's at 4,096
TRAINING_BOUNDS = {("bf16", 2048): 1.45, ("fp32", 2048): 1.33, ("bf16", 4096): 1.33}
LONG_BOUND = 2.5  # at 16,384
GENERATION_BOUND = 1.30
HUGGING_FACE_BOUND = 3.0
PRODUCTS_BOUND = 0.70


def measure_layers(problem: Problem, layers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds, forward and backward, of every kind of layer; of the head a token,
    of the update a weight; and of the matrix products of both kinds of layers, alone."""
    calls: dict[str, Callable[[], object]] = {}
    for model in rival_models(problem, layers).values():
        for layer in range(layers):
            if (name := kind(model, layer)) not in calls:
                calls[name] = layer_call(model, layer, problem)
    calls["products of attention"] = products_call(problem, attention=True)
    calls["products of SSD"] = products_call(problem, attention=False)
    head, update = head_call(problem, layers), update_call(problem)
    found = in_turns(calls, device(), repeats)
    found |= in_turns({"head": head[0], "update": update[0]}, device(), repeats)
    seconds = {name: list(times.seconds) for name, times in found.items()}
    seconds["head"] = [s / head[1] for s in seconds["head"]]
    seconds["update"] = [s / update[1] for s in seconds["update"]]
    return seconds


def peak_flops(dtype: str, repeats: int) -> float:
    """This machine's matrix products a second, the best of some sizes."""
    best = 0.0
    for size in (1024, 2048) if device().type == "cpu" else (8192,):
        a, b = (torch.randn(size, size, device=device()).to(DTYPES[dtype]) for _ in range(2))
        times = in_turns({"": lambda a=a, b=b: a @ b}, device(), repeats)  # type: ignore[misc]
        best = max(best, 2 * size**3 / min(times[""].seconds))
    return best


def measure_whole(problem: Problem, repeats: int) -> dict[str, list[float]]:
    """Training steps of 8 layers, whole."""
    calls = {
        rival.name: step_call(rival_model(rival, problem.model(WHOLE_LAYERS)), problem)
        for rival in (TRANSXSSM, ATTENTION)
    }
    return {n: list(t.seconds) for n, t in in_turns(calls, device(), repeats).items()}


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


def measure_generation(problem: Problem, repeats: int) -> dict[str, list[float]]:
    """A token at batch 1 after problem.length of context, by the single-GPU model."""
    calls = {rival.name: generation_call(rival, problem) for rival in (TRANSXSSM, ATTENTION)}
    found = in_turns(calls, device(), repeats)
    return {name: [s / GENERATED for s in times.seconds] for name, times in found.items()}


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
        console.print(f"{dtype}: matrix products at {peak / 1e12:,.3g} TFLOP/s, {device_name()}")
        for intermediate in options.intermediate:
            # other widths of the feed-forward at one length
            lengths = options.lengths if intermediate == options.intermediate[0] else (4096,)
            for length in lengths:
                problem = Problem(dtype, length, intermediate, sequences(length))
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
    if device().type == "cuda" or options.threads > 1:  # the bounds are of one CPU thread
        for _, said in verdicts:
            console.print(said)
        return 0
    for met, said in verdicts:
        console.print(f"{'met   ' if met else 'MISSED'} {said}")
    return 0 if all(met for met, _ in verdicts) else 1


def sequences(length: int) -> int:
    """Of a training step."""
    return max(1, GPU_TOKENS // length) if device().type == "cuda" else 1


def whole(
    console: Console, remembered: Remembered, dtype: str, options: Options
) -> list[tuple[bool, str]]:
    """Whole models and generation."""
    length = max((n for n in options.lengths if n <= 4096), default=options.lengths[0])
    problem = Problem(dtype, length, options.intermediate[0], sequences(length))
    repeats, verdicts = options.repeats, []
    trained = remembered.get(f"whole {problem.key}", lambda: measure_whole(problem, repeats))
    ratio = ratios(trained[ATTENTION.name], trained[TRANSXSSM.name])
    console.print(
        f"{dtype}, {WHOLE_LAYERS} layers whole, {problem.sequences} × {problem.length:,} tokens: "
        f"{statistics.median(trained[TRANSXSSM.name]):.3g} s a step, {shown(ratio)} the rate of "
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
    problem = Problem(
        dtype, HUGGING_FACE_TOKENS, options.intermediate[0], 2 if device().type == "cuda" else 1
    )
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
