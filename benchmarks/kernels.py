"""The scan against its rivals, forward and backward, in one process.

    transxssm kernels bench [--quick] [--lengths 4096,16384,65536] [--dtypes fp32,bf16]
                            [--repeats 5] [--threads 1]

CPU: SDPA (the machine's best attention) and a plain chunked scan under autograd. GPU: SDPA, and
mamba_ssm and FLA where they can be imported. Batch 1, H = 8, P = N = 128 unless told.

Times are medians over repeats that take turns, so that a slow minute of the machine falls on all
alike: process time on a CPU with one thread, wall time with more, events on a GPU. Extra memory is
the peak of what a call allocates, results included, inputs not.
"""

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softplus

from benchmarks.timing import seconds_of
from kernels.rope.rope import apply_rope
from kernels.rope.table import rotary_cos_sin
from kernels.ssd.ssd import ssd

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on stderr

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {4096: 6.0, 16384: 19.0}  # SDPA's time over the scan's, forward and backward, one thread
PLAIN_BOUND = 1.3  # the plain scan's time over the scan's at 4,096
GROWTH_BOUND = 1.3  # time a token at the longest length over that at 4,096
PLAIN_CHUNK = 64
RIVALS_LONGEST = 16384  # on a CPU: beyond, attention takes minutes a call

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    dtype: str
    length: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 128
    state_dim: int = 128


@dataclass(frozen=True)
class Measured:
    forward: float  # seconds, median
    both: float  # forward and backward
    memory: int  # bytes


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (None: this process's) and run."""
    parser = argparse.ArgumentParser(
        "transxssm kernels bench", description="Time the scan against its rivals."
    )
    parser.add_argument("--lengths", default="4096,16384,65536", help="multiples of 64 tokens")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--quick", action="store_true", help="4,096 tokens, 3 repeats")
    given = parser.parse_args(arguments)
    named = "4096" if given.quick else given.lengths
    if not all(n.isdecimal() and int(n) and int(n) % PLAIN_CHUNK == 0 for n in named.split(",")):
        parser.error(f"--lengths {named}: expected multiples of {PLAIN_CHUNK}, as 4096,16384")
    lengths = [int(length) for length in named.split(",")]
    dtypes = given.dtypes.split(",")
    for option in ("repeats", "threads"):
        if (value := getattr(given, option)) < 1:
            parser.error(f"--{option} {value}: expected 1 or more")
    if bad_dtypes := sorted(set(dtypes) - DTYPES.keys()):
        parser.error(f"--dtypes: {bad_dtypes}; expected {' or '.join(DTYPES)}")
    return bench(lengths, dtypes, 3 if given.quick else given.repeats, given.threads)


def bench(lengths: list[int], dtypes: list[str], repeats: int, threads: int) -> int:
    """Print the tables. Returns 1 when, on a CPU with one thread, a stated bound is missed."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems = [Problem(dtype, length) for dtype in dtypes for length in lengths]
    found: dict[tuple[Problem, str], Measured] = {}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("timing", total=len(problems))
        for problem in problems:
            for name, measured in measure(problem, device, repeats).items():
                found[problem, name] = measured
            bar.advance(task)
    console = Console(highlight=False)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} thread(s)"
    for dtype in dtypes:
        chosen = {key: value for key, value in found.items() if key[0].dtype == dtype}
        console.print(_table(chosen, f"{dtype}, {where}, medians of {repeats}"))
    if device.type == "cuda" or threads > 1:
        return 0
    verdicts = [line for dtype in dtypes for line in judge(found, dtype)]
    for met, sentence in verdicts:
        console.print(f"{'met   ' if met else 'MISSED'} {sentence}")
    return 0 if all(met for met, _ in verdicts) else 1


def judge(found: dict[tuple[Problem, str], Measured], dtype: str) -> list[tuple[bool, str]]:
    """Whether each bound holds, of those whose lengths were measured."""
    at = {(p.length, name): m for (p, name), m in found.items() if p.dtype == dtype}
    verdicts = []
    for length, bound in BOUNDS.items():
        if (length, "ssd") in at:
            ratio = at[length, "sdpa"].both / at[length, "ssd"].both
            said = f"{dtype} {length}: {ratio:.1f}x faster than SDPA, forward and backward"
            verdicts.append((ratio >= bound, f"{said} (bound {bound:g}x)"))
    if (4096, "ssd") in at:
        ratio = at[4096, "plain"].both / at[4096, "ssd"].both
        said = f"{dtype} 4096: {ratio:.2f}x faster than the plain chunked scan"
        verdicts.append((ratio >= PLAIN_BOUND, f"{said} (bound {PLAIN_BOUND:g}x)"))
        longest = max(length for length, name in at if name == "ssd")
        if longest > 4096:
            growth = at[longest, "ssd"].both / at[4096, "ssd"].both / (longest / 4096)
            said = f"{dtype} {longest}: {growth:.2f}x the time a token of 4096"
            verdicts.append((growth <= GROWTH_BOUND, f"{said} (bound {GROWTH_BOUND:g}x)"))
            growth = at[longest, "ssd"].memory / at[4096, "ssd"].memory / (longest / 4096)
            said = f"{dtype} {longest}: {growth:.2f}x the extra memory a token of 4096"
            verdicts.append((growth <= 1.05, f"{said} (bound 1.05x: linear)"))
    return verdicts


def measure(problem: Problem, device: torch.device, repeats: int) -> dict[str, Measured]:
    """Every rival on one problem, taking turns."""
    calls = {
        name: (partial(_forward, rival, inputs), partial(_both, rival, inputs))
        for name, (rival, inputs) in rivals(problem, device).items()
    }
    memory = {name: peak_memory(both, device) for name, (_, both) in calls.items()}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for turn in range(repeats + 1):
        for name, pair in calls.items():
            for call, taken in zip(pair, times[name], strict=True):
                seconds = seconds_of(call, device)
                if turn:  # the first warms up
                    taken.append(seconds)
    return {
        name: Measured(statistics.median(forward), statistics.median(both), memory[name])
        for name, (forward, both) in times.items()
    }


def rivals(
    problem: Problem, device: torch.device
) -> dict[str, tuple[Callable[..., Tensor], Inputs]]:
    """Name → function and its inputs; gradients are taken of those that require them."""
    inputs = make_inputs(problem, device)
    shape = problem.batch, problem.heads, problem.length, problem.head_dim
    qkv = {name: _normal(shape, problem, device).requires_grad_() for name in ("q", "k", "v")}
    found: dict[str, tuple[Callable[..., Tensor], Inputs]] = {"ssd": (ssd_without_state, inputs)}
    if device.type == "cuda" or problem.length <= RIVALS_LONGEST:
        found["sdpa"] = (causal_attention, qkv)
    if device.type == "cpu" and problem.length <= RIVALS_LONGEST:
        found["plain"] = (plain_chunked, inputs)
    if device.type == "cuda" and importlib.util.find_spec("mamba_ssm") is not None:
        found["mamba_ssm"] = (mamba_scan, inputs)
    if device.type == "cuda" and importlib.util.find_spec("fla") is not None:
        found["fla"] = (fla_scan, inputs)
    return found


def make_inputs(problem: Problem, device: torch.device) -> Inputs:
    """Arguments of `kernels.ssd.ssd.ssd` for whole rows without packing."""
    batch, length, heads = problem.batch, problem.length, problem.heads
    positions = torch.arange(length, device=device).expand(batch, length)
    cos, sin = rotary_cos_sin(positions, problem.state_dim, 10000.0, {})
    per_token = batch, length, heads
    trained = {
        "x": _normal((*per_token, problem.head_dim), problem, device),
        "dt": _normal(per_token, problem, device),
        "A": -torch.logspace(0, 1.2, heads, device=device),
        "B": _normal((*per_token, problem.state_dim), problem, device),
        "C": _normal((*per_token, problem.state_dim), problem, device),
        "dt_bias": torch.randn(heads, device=device) - 4,
    }
    borders = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    fixed = {"cos": cos, "sin": sin, "cu_seqlens": borders}
    return {name: t.requires_grad_() for name, t in trained.items()} | fixed


def ssd_without_state(**inputs: Any) -> Tensor:
    y = ssd(**inputs)
    assert isinstance(y, Tensor)
    return y


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on heads × tokens; no rotation, which it would have to pay for apart."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def plain_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor, sin: Tensor,
    dt_bias: Tensor, cu_seqlens: Tensor,
) -> Tensor:  # fmt: skip
    """The chunked algorithm (Mamba-2, section 6) as written down, all chunks at once, autograd.

    For whole chunks and H = G, one document a row; `cu_seqlens` is taken to say so.
    """
    batch, length, heads, _ = x.shape

    def chunks(t: Tensor) -> Tensor:  # [B, L, H, ...] → [B, K, H, Q, ...]
        return t.unflatten(1, (length // PLAIN_CHUNK, PLAIN_CHUNK)).transpose(2, 3)

    delta = softplus(dt.float() + dt_bias)
    s = chunks(delta * A).cumsum(-1)  # [B, K, H, Q]
    x, b, c = (
        chunks(t)
        for t in (
            (x * delta.unsqueeze(-1)).to(x.dtype),
            apply_rope(B, cos, sin),
            apply_rope(C, cos, sin),
        )
    )
    later = torch.ones(PLAIN_CHUNK, PLAIN_CHUNK, dtype=torch.bool, device=x.device).triu(1)
    decay = (s.unsqueeze(-1) - s.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    y = (c @ b.mT * decay.to(x.dtype)) @ x
    to_end = (s[..., -1:] - s).exp().unsqueeze(-1).to(x.dtype)
    states = ((x * to_end).mT @ b).float()  # [B, K, H, P, N]
    carried, state = [], torch.zeros_like(states[:, 0])
    for written, kept in zip(states.unbind(1), s[..., -1].exp().unbind(1), strict=True):
        carried.append(state)
        state = state * kept[..., None, None] + written
    entries = torch.stack(carried, 1).to(x.dtype)
    y = y + (c @ entries.mT) * s.exp().unsqueeze(-1).to(x.dtype)
    return y.transpose(2, 3).reshape(batch, length, heads, -1)


def mamba_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor, sin: Tensor,
    dt_bias: Tensor, cu_seqlens: Tensor,
) -> Tensor:  # fmt: skip
    """mamba_ssm's Triton chain after a rotation of its own."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    b, c = apply_rope(B, cos, sin), apply_rope(C, cos, sin)
    y: Tensor = mamba_chunk_scan_combined(
        x, dt, A, b, c, chunk_size=256, dt_bias=dt_bias, dt_softplus=True
    )
    return y


def fla_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor, sin: Tensor,
    dt_bias: Tensor, cu_seqlens: Tensor,
) -> Tensor:  # fmt: skip
    """FLA's chunked gated linear attention, which is the scan with v = Δ x and gates Δ A."""
    from fla.ops.simple_gla import chunk_simple_gla

    b, c = apply_rope(B, cos, sin), apply_rope(C, cos, sin)
    delta = softplus(dt.float() + dt_bias)
    v = (x * delta.unsqueeze(-1)).to(x.dtype)
    y: Tensor = chunk_simple_gla(c, b, v, g=delta * A, scale=1.0)[0]
    return y


def peak_memory(call: Callable[[], None], device: torch.device) -> int:
    """Peak bytes a call allocates beyond what was there before."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    results = profile.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


def _normal(shape: tuple[int, ...], problem: Problem, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(DTYPES[problem.dtype])


def _forward(rival: Callable[..., Tensor], inputs: Inputs) -> None:
    with torch.no_grad():
        rival(**inputs)


def _both(rival: Callable[..., Tensor], inputs: Inputs) -> None:
    y = rival(**inputs)
    leaves = [t for t in inputs.values() if t.requires_grad]
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def _table(found: dict[tuple[Problem, str], Measured], title: str) -> Table:
    table = Table(title=title)
    for name in (
        "tokens",
        "",
        "forward ms",
        "fwd+bwd ms",
        "us/token",
        "extra MiB",
        "time/ssd's",
    ):
        table.add_column(name, justify="left" if not name else "right")
    for (problem, name), measured in found.items():
        own = found[problem, "ssd"]
        table.add_row(
            f"{problem.length:,}", name, f"{measured.forward * 1e3:.1f}",
            f"{measured.both * 1e3:.1f}", f"{measured.both / problem.length * 1e6:.1f}",
            f"{measured.memory / 2**20:.0f}", f"{measured.both / own.both:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
