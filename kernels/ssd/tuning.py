"""Find the fastest tile of the Triton scan on this GPU: `transxssm kernels tune`."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from kernels.ssd.ssd import ssd
from kernels.ssd.tiles import Tile, fixed_tile, forced_tile, key, read_tiles, write_tiles
from kernels.target import Target, current_target, interpreting
from untrusted.names import check_local

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative RMS by which a tile's results may differ from those of the fixed one: rounding of sums in
# another order. More means that the tile was miscompiled.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}

Results = dict[str, Tensor]


def candidates(target: Target, dtype: torch.dtype, head_dim: int, state_dim: int) -> list[Tile]:
    """The fixed tile, then all others worth a trial."""
    fixed = fixed_tile(target, dtype, head_dim, state_dim)
    # pipelined loops that carry a decayed accumulator are miscompiled (Triton pull request 10993)
    blackwell = isinstance(target.arch, int) and target.arch // 10 == 10
    found = [fixed]
    for chunk, p_block, num_warps, num_stages in itertools.product(
        (16, 32) if dtype.itemsize == 4 else (16, 32, 64, 128),
        [size for size in (16, 32, 64, 128) if head_dim % size == 0],
        (4, 8),
        (1,) if blackwell or target.backend == "hip" else (1, 2),
    ):
        tile = replace(
            fixed, chunk=chunk, p_block=p_block, num_warps=num_warps, num_stages=num_stages
        )
        if tile != fixed:
            found.append(tile)
    return found


def fastest(
    tiles: Iterable[Tile], trial: Callable[[Tile], tuple[float, Results]], tolerance: float
) -> tuple[Tile, dict[Tile, float | str]]:
    """The tile of least time, and every one's milliseconds or why it is out of the question.

    trial runs a tile: milliseconds and results, which must agree with the first tile's. What does
    not compile or launch is passed over; only the first tile must.
    """
    tiles = iter(tiles)
    first = next(tiles)
    best_time, expected = trial(first)
    best, outcomes = first, dict[Tile, float | str]({first: best_time})
    for tile in tiles:
        try:
            time, results = trial(tile)
        except Exception as error:  # whatever compiler and driver throw
            outcomes[tile] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if wrong := _disagreement(results, expected, tolerance):
            outcomes[tile] = wrong
            continue
        outcomes[tile] = time
        if time < best_time:
            best, best_time = tile, time
    return best, outcomes


def _disagreement(found: Results, expected: Results, tolerance: float) -> str | None:
    for name, right in expected.items():
        error = (found[name].double() - right.double()).norm() / right.double().norm()
        if not error <= tolerance:  # NaN too
            return f"{name} differs from the fixed tile's by {error:.1e}"
    return None


def run_scan(inputs: dict[str, Any], dy: Tensor) -> Results:
    """Output and gradients of a forward and backward."""
    wanted = {name: inputs[name] for name in ("x", "dt", "A", "B", "C", "dt_bias")}
    y = ssd(**inputs)
    assert isinstance(y, Tensor)
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def make_inputs(
    batch: int, length: int, heads: int, head_dim: int, state_dim: int, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Of a scan with rotation, at step sizes and decays of a model at its start."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    angles = torch.randn(batch, length, state_dim // 2, generator=generator, device=device)
    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads),
        "A": torch.linspace(-1, -16, heads, device=device).requires_grad_(),
        "B": normal(batch, length, heads, state_dim),
        "C": normal(batch, length, heads, state_dim),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "dt_bias": torch.full((heads,), -4.0, device=device).requires_grad_(),
        "cu_seqlens": torch.arange(batch + 1, device=device, dtype=torch.int32) * length,
    }


def main(arguments: list[str]) -> int:
    """Tune one size, and put its tile into the file beside those of other sizes."""
    parser = argparse.ArgumentParser("transxssm kernels tune", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="for TRANSXSSM_TILES")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    for name, default in {
        "batch": 8, "length": 4096, "heads": 16, "head-dim": 128, "state-dim": 128,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    options = parser.parse_args(arguments)
    check_local(options.output, "--output")
    if interpreting() or not torch.cuda.is_available():
        parser.error("there is no GPU here to time kernels on")
    known = read_tiles(options.output) if options.output.exists() else {}
    target, dtype, device = current_target(), DTYPES[options.dtype], torch.device("cuda")
    size = (options.head_dim, options.state_dim)
    inputs = make_inputs(options.batch, options.length, options.heads, *size, dtype, device)
    dy = torch.randn_like(inputs["x"])

    def trial(tile: Tile) -> tuple[float, Results]:
        from triton.testing import do_bench

        with forced_tile(tile):
            results = run_scan(inputs, dy)
            return float(do_bench(lambda: run_scan(inputs, dy), return_mode="median")), results

    tiles = candidates(target, dtype, *size)
    console = Console(stderr=True)
    with Progress(console=console) as bar:
        best, outcomes = fastest(
            bar.track(tiles, description="timing tiles"), trial, TOLERANCE[dtype]
        )
    for tile, outcome in outcomes.items():
        print(f"{outcome:9.3f} ms  {tile}" if isinstance(outcome, float) else f"{tile}: {outcome}")
    write_tiles(options.output, known | {key(target, dtype, *size): best})
    print(
        f"wrote {options.output}: {best}\nuse it: export TRANSXSSM_TILES={options.output.resolve()}"
    )
    return 0
