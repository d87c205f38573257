"""Measurements of one GPU for `benchmarks.gpu_day`, a function each.

Every function returns rows, a list of flat dictionaries, and takes `tiny`: on a CPU the same code
runs at sizes without meaning, to show that it runs. Times are of events on the device, medians of
repeats, in milliseconds; a "replayed" call was captured into a CUDA graph before, so that the host
has no part in its time.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_check
from benchmarks.kernels import Problem as ScanProblem
from benchmarks.kernels import _both, causal_attention, make_inputs, ssd_without_state
from benchmarks.rivals import ATTENTION, TRANSXSSM, rival_model
from benchmarks.speed_calls import Problem, device, join, layer_call
from benchmarks.timing import in_turns
from parallel.compiled import compile_layers
from parallel.context import LocalBatch
from parallel.flops import training_flops_per_token
from parallel.graphs import MicroBatchGraphs, graph_maker
from parallel.loss import head_loss
from parallel.peaks import gpu_peak, product_peak
from parallel.products import add_product
from parallel.schedule import count_tokens, forward_backward
from parallel.zero import ZeroOptimizer
from pretrain.config import Config, load_config

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, STEPS = 3, 20
TOKENS_A_MICRO_BATCH = 32_768


def launch_floor(tiny: bool) -> list[Row]:
    """Host and device time of an operation that does next to nothing: issued, and replayed."""
    calls = 100
    x = torch.zeros(16, device=device())
    eager = [(f"add_, {calls} in a row", lambda: [x.add_(1) for _ in range(calls)])]
    weight = torch.ones(64, device=device(), dtype=torch.bfloat16)
    h = torch.ones(16, 64, device=device(), dtype=torch.bfloat16)
    from kernels.norm.norm import rms_norm

    eager.append((f"RMSNorm, {calls} in a row", lambda: [rms_norm(h, weight, 1e-6)] * calls))
    rows = []
    for name, call in eager:
        times = in_turns({"issued": call, "replayed": replayed(call)}, device(), repeats(tiny))
        rows.append(
            {"operation": name}
            | {f"{how} us": times[how].median / calls * 1e6 for how in ("issued", "replayed")}
        )
    return rows


def layers(tiny: bool) -> list[Row]:
    """A layer of each kind, forward and backward, issued by the host and replayed."""
    join()
    shapes = [(128, 1)] if tiny else [(4096, 8), (16384, 2)]
    rows = []
    for length, sequences in shapes:
        problem = Problem("bf16", length, 128 if tiny else 2048, sequences)
        model = problem.model(8)
        if tiny:
            small = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "ssd_groups": 2}
            model = model.model_validate(
                model.model_dump() | small | {"head_dim": 32, "state_dim": 32}
            )
        for layer, kind in ((0, "SSD"), (7, "attention")):
            call = layer_call(model, layer, problem)
            times = in_turns({"issued": call, "replayed": replayed(call)}, device(), repeats(tiny))
            host = host_seconds(call)
            rows.append(
                {
                    "layer": f"{kind}, {sequences} x {length:,}",
                    "issued ms": times["issued"].median * 1e3,
                    "replayed ms": times["replayed"].median * 1e3,
                    "host ms": host * 1e3,
                }
            )
    return rows


def scans(tiny: bool) -> list[Row]:
    """The scan and SDPA, forward and backward, replayed, by how many sequences of heads there are.

    P = 64, N = 128 as `configs/320m.toml`, and P = N = 128.
    """
    if tiny:
        problems = [ScanProblem("bf16", 128, 1, 2, 32, 32)]
    else:
        problems = [
            ScanProblem("bf16", 4096, batch, heads, head_dim, 128)
            for head_dim in (64, 128)
            for batch, heads in ((1, 8), (4, 12), (8, 12), (8, 16), (8, 24), (12, 32))
        ]
    rows = []
    for problem in problems:
        inputs = make_inputs(problem, device())
        shape = problem.batch, problem.heads, problem.length, problem.head_dim
        qkv: dict[str, Any] = {
            name: torch.randn(shape, device=device(), dtype=torch.bfloat16).requires_grad_()
            for name in ("q", "k", "v")
        }

        def scan(inputs: Any = inputs) -> None:
            _both(ssd_without_state, inputs)

        def sdpa(inputs: Any = qkv) -> None:
            _both(causal_attention, inputs)

        found = in_turns({"scan": replayed(scan), "SDPA": replayed(sdpa)}, device(), repeats(tiny))
        rows.append(
            {
                "batch x heads": f"{problem.batch} x {problem.heads}",
                "P": problem.head_dim,
                "N": problem.state_dim,
                "scan ms": found["scan"].median * 1e3,
                "SDPA ms": found["SDPA"].median * 1e3,
            }
        )
    return rows


def head(tiny: bool) -> list[Row]:
    """Output head and loss, forward and backward: our kernel, and float32 logits in blocks."""
    join()
    tokens, hidden, vocab = (64, 32, 128) if tiny else (TOKENS_A_MICRO_BATCH, 768, 50304)
    h = torch.randn(tokens, hidden, device=device(), dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, hidden, device=device(), dtype=torch.bfloat16).mul_(0.02)
    weight.requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device())
    mask = torch.ones(tokens, device=device())

    def ours() -> None:
        total, _ = head_loss(h, weight, labels, mask, vocab)
        torch.autograd.grad(total, (h, weight))

    def plain() -> None:
        for part in range(0, tokens, 2048):
            chosen = slice(part, part + 2048)
            logits = torch.nn.functional.linear(h[chosen], weight).float()
            total = torch.nn.functional.cross_entropy(logits, labels[chosen], reduction="sum")
            torch.autograd.grad(total, (h, weight))

    found = in_turns({"ours": ours, "plain": plain}, device(), repeats(tiny))
    return [
        {
            "tokens x vocabulary": f"{tokens:,} x {vocab:,}",
            "kernel ms": found["ours"].median * 1e3,
            "float32 logits, blocks of 2,048 ms": found["plain"].median * 1e3,
        }
    ]


def products(tiny: bool) -> list[Row]:
    """Weight gradients: added in float32 inside the product, and rounded to bf16 and added."""
    tokens = 64 if tiny else TOKENS_A_MICRO_BATCH
    shapes = [(64, 32)] if tiny else [(3856, 768), (7168, 768), (768, 3584), (2304, 768)]
    rows = []
    for outputs, inputs in shapes:
        dy = torch.randn(tokens, outputs, device=device(), dtype=torch.bfloat16)
        x = torch.randn(tokens, inputs, device=device(), dtype=torch.bfloat16)
        total = torch.zeros(outputs, inputs, device=device())

        def inside(dy: Tensor = dy, x: Tensor = x, total: Tensor = total) -> None:
            add_product(total, dy.t(), x)

        def after(dy: Tensor = dy, x: Tensor = x, total: Tensor = total) -> None:
            total.add_(dy.t() @ x)

        found = in_turns({"inside": inside, "after": after}, device(), repeats(tiny))
        flops = 2 * tokens * outputs * inputs
        rows.append(
            {
                "gradient of": f"{outputs:,} x {inputs:,}",
                "added inside ms": found["inside"].median * 1e3,
                "rounded, then added ms": found["after"].median * 1e3,
                "TFLOP/s inside": flops / found["inside"].median / 1e12,
            }
        )
    return rows


def training_320m(tiny: bool) -> list[Row]:
    """Steps of `configs/320m.toml` and of its attention rival at 4,096 tokens."""
    return _training("320m", 4096, 8, tiny)


def training_320m_long(tiny: bool) -> list[Row]:
    """The same at 16,384 tokens."""
    return _training("320m", 16384, 2, tiny)


def training_1_3b(tiny: bool) -> list[Row]:
    """Steps of `configs/1.3b.toml` and of its attention rival at 4,096 tokens."""
    return _training("1.3b", 4096, 4, tiny)


def compiled_320m(tiny: bool) -> list[Row]:
    """Steps of `configs/320m.toml` with compiled layers."""
    return _training("320m", 4096, 8, tiny, compiled=True)


def _training(
    preset: str, length: int, micro_batch_size: int, tiny: bool, *, compiled: bool = False
) -> list[Row]:
    """Measure both models, without and with graphs; the losses of the two must be equal.

    Compiled, TransXSSM alone. A CPU's stand-in for graphs cannot record compiled layers.
    """
    join()
    rows, measured = [], product_peak(device())
    with_graphs = (False,) if compiled and device().type == "cpu" else (False, True)
    rivals = (TRANSXSSM,) if compiled else (TRANSXSSM, ATTENTION)
    for rival, graphs in itertools.product(rivals, with_graphs):
        config = _config(preset, length, micro_batch_size, tiny)
        model = rival_model(rival, config.model) if not tiny else config.model
        config = config.model_copy(update={"model": model})
        zero = _optimizer(config)
        if compiled:
            compile_layers(zero.built)
        batches = [random_batch(config) for _ in range(2)]
        run = MicroBatchGraphs(zero, graph_maker(device())).run if graphs else None
        if device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = [step_seconds(zero, batches, run) for _ in range(3 if tiny else WARM_UP + STEPS)]
        seconds = [taken for taken, _ in steps]
        median = statistics.median(seconds[1 if tiny else WARM_UP :])
        tokens = sum(batch.tokens.numel() for batch in batches)
        flops = tokens / median * training_flops_per_token(config.model, length)
        peak = gpu_peak(device())
        memory = torch.cuda.max_memory_allocated() if device().type == "cuda" else 0
        rows.append(
            {
                "model": f"{preset}, {rival.name}",
                "sequence": length,
                "micro-batch": micro_batch_size,
                "graphs": "on" if graphs else "off",
                "tokens/s": tokens / median,
                "model TFLOP/s": flops / 1e12,
                "share of the data sheet's peak": flops / peak if peak else None,
                "share of a product's measured peak": flops / measured,
                "memory GiB": memory / 2**30,
                "last loss": f"{steps[-1][1]:.6f}",
            }
        )
        del zero, batches, run
        if device().type == "cuda":
            torch.cuda.empty_cache()
    return rows


def profile_320m(tiny: bool) -> list[Row]:
    """Where a step of `configs/320m.toml` goes: the device's busy time, and its kernels."""
    join()
    config = _config("320m", 4096, 8, tiny)
    zero, batches = _optimizer(config), [random_batch(config) for _ in range(2)]
    for _ in range(1 if tiny else WARM_UP):
        step_seconds(zero, batches)
    on_gpu = device().type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=kinds) as profile:
        begin = time.perf_counter()
        step_seconds(zero, batches)
        wall = time.perf_counter() - begin
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events() if event.device_type == wanted]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    rows: list[Row] = [
        {
            "what": "step, device busy",
            "ms": busy_microseconds(spans) / 1e3,
            "calls": len(spans),
        },
        {"what": "step, wall", "ms": wall * 1e3, "calls": 1},
    ]
    totals: dict[str, tuple[float, int]] = {}
    for event in events:
        spent, calls = totals.get(event.name, (0.0, 0))
        length = event.time_range.end - event.time_range.start
        totals[event.name] = spent + length, calls + 1
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:25]
    rows += [{"what": name[:80], "ms": us / 1e3, "calls": n} for name, (us, n) in longest]
    return rows


def busy_microseconds(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of sorted spans."""
    busy, reached = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy


def self_check(tiny: bool) -> list[Row]:
    """The tests of the kernels, compiled, of the sizes that training uses; on a CPU one of them."""
    chosen = "test_scale_is_used" if tiny else "not traffic"
    tests = ["tests/kernels/test_attention.py"] if tiny else ["tests/interpreted"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-n", "0", "-k", chosen],
        cwd=ROOT, capture_output=True, text=True,
        env=gpu_check.os.environ | ({} if tiny else {"TRANSXSSM_TEST_DEVICE": "cuda"}),
    )  # fmt: skip
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    return [{"tests": " ".join(tests), "outcome": last, "passed": done.returncode == 0}]


def untried(tiny: bool) -> list[Row]:
    """The parts of gpu_check that no GPU has run: bf16 curve, resume, export, evaluation."""
    if tiny:
        return [{"part": "bf16 curve, resume, export, evaluation", "outcome": "not run here"}]
    gpu_check.prepare_data()
    with tempfile.TemporaryDirectory() as folder:
        good = gpu_check.check(1, gpu_check.STEPS, Path(folder), [(1, "bf16", [])])
    return [
        {"part": "bf16 curve, resume, export, evaluation", "outcome": "met" if good else "MISSED"}
    ]


def tuning(tiny: bool) -> list[Row]:
    """The fastest tile of the scan of every preset, by `transxssm kernels tune`."""
    if tiny:
        return [{"size": "none", "tile": "not run here"}]
    rows = []
    for heads, head_dim in ((12, 64), (32, 64)):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-m", "pretrain", "kernels", "tune", "--output",
                 str(Path(folder) / "tiles.json"), "--heads", str(heads), "--head-dim",
                 str(head_dim), "--state-dim", "128"],
                cwd=ROOT, capture_output=True, text=True,
            )  # fmt: skip
        for line in done.stdout.splitlines():
            if " ms " in line or line.startswith("wrote"):
                rows.append({"size": f"H {heads}, P {head_dim}, N 128", "tile": line[:160]})
    return rows


# -- parts ------------------------------------------------------------------------------------


def repeats(tiny: bool) -> int:
    """Turns of each call, after a warm-up."""
    return 1 if tiny else 10


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The call captured into a CUDA graph; on a CPU the call itself."""
    if device().type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_seconds(call: Callable[[], object]) -> float:
    """What the host needs to issue a call; the device may be still at it."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
        if device().type == "cuda":
            torch.cuda.synchronize()
    return statistics.median(found)


def _config(preset: str, length: int, micro_batch_size: int, tiny: bool) -> Config:
    """The preset for one GPU; on a CPU a model of two layers in its place."""
    overrides: dict[str, Any] = {
        "data": {"seq_len": length},
        "model": {"max_position_embeddings": length},
        "training": {"micro_batch_size": micro_batch_size},
    }
    if tiny:
        overrides["model"] |= {
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_layers": 2,
            "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "state_dim": 32, "ssd_groups": 2,
            "attn_layer_period": 2, "attn_layer_offset": 1, "max_position_embeddings": 128,
        }  # fmt: skip
        overrides["data"]["seq_len"] = 128
        overrides["training"] = {"micro_batch_size": 1}
    loaded = load_config(ROOT / "configs" / f"{preset}.toml")
    parts = {
        name: getattr(loaded, name).model_copy(update=fields) for name, fields in overrides.items()
    }
    return loaded.model_copy(update=parts)


def _optimizer(config: Config) -> ZeroOptimizer:
    from pretrain.stage import configured_optimizer

    return configured_optimizer(config, device())


def random_batch(config: Config) -> LocalBatch:
    """A micro-batch of random tokens, two documents of unequal length a row."""
    rows, length = config.training.micro_batch_size, config.data.seq_len
    where = device()
    generator = torch.Generator().manual_seed(0)
    cut = length * 2 // 3
    starts = [row * length + offset for row in range(rows) for offset in (0, cut)]
    boundaries = torch.tensor([*starts, rows * length], dtype=torch.int32, device=where)
    tokens = torch.randint(config.model.vocab_size, (rows, length + 1), generator=generator)
    positions = torch.cat((torch.arange(cut), torch.arange(length - cut))).int().repeat(rows, 1)
    return LocalBatch(
        tokens[:, :-1].contiguous().to(where),
        tokens[:, 1:].contiguous().to(where),
        torch.ones(rows, length, device=where),
        positions.to(where),
        boundaries,
        boundaries,
        torch.zeros(rows, dtype=torch.int64, device=where),
    )


def step_seconds(
    zero: ZeroOptimizer,
    batches: Sequence[LocalBatch],
    run: Callable[[Sequence[LocalBatch], Tensor], list[Tensor]] | None = None,
) -> tuple[float, float]:
    """Seconds and loss of one step as `pretrain.trainer` makes it, waited for.

    run: of `parallel.graphs`, where micro-batches are graphs.
    """
    where = batches[0].tokens.device
    begin = time.perf_counter()
    sums = forward_backward(zero, batches, count_tokens(batches, where), 1, run)
    (loss,), (tokens,), norm = sums.on_host(zero.grad_norm())
    zero.step(1e-4, norm)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - begin, loss / tokens
