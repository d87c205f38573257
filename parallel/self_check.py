"""Fast paths that only a GPU executes, each compared there with what runs in its place.

A check computes the same thing twice, on small inputs: as training would, and with its path
switched off (`kernels.paths`), which is exactly what training falls back to. An exception, a number
that is not finite or results too far apart switch the path off, on all ranks alike. Operations come
before what is built on them, and a path that failed stays off during the later checks.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import dispatch
from kernels.cross_entropy.cross_entropy import cross_entropy_, implementation_of
from kernels.dispatch import choose, strict
from kernels.norm.norm import add_rms_norm, rms_norm, weighted_residual
from kernels.paths import COLUMN_SLICES, FLOAT32_SUMS, SCAN_SEGMENTS, switch_off, without
from kernels.rope.rope import apply_rope, rotate_qkv
from kernels.ssd.ssd import ssd_from_log
from kernels.swiglu.swiglu import swiglu
from kernels.target import current_target
from parallel.config import ModelConfig
from parallel.groups import host_group
from parallel.products import add_product, can_sum_inside
from parallel.projections import columns
from untrusted.errors import UserError

log = logging.getLogger("transxssm")

TOLERANCE = 3e-2
"""Relative RMS difference of a result. Rounding to bf16 in another order makes a third of it."""
SLICE_TOLERANCE = 0.3
"""The same of a single row or column: where no other is wrong, the whole hardly shows it. Rounding
makes less than a tenth of it."""
ROWS, LENGTH = 2, 140  # of mixers: longer than the largest chunk


class SelfCheckError(UserError):
    """A path cannot be used, and nothing can run in its place."""


@dataclass(frozen=True)
class Inputs:
    """Makes the inputs of checks: the same numbers on every rank, and no others each time."""

    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, whose gradient can be asked for."""
        numbers = torch.randn(shape, generator=self.generator, device=self.device)
        return numbers.to(self.dtype).requires_grad_()

    def tables(self, dim: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
        """cos and sin [ROWS, length, dim / 2] of some angles."""
        shape = (ROWS, length, dim // 2)
        angles = torch.randn(shape, generator=self.generator, device=self.device)
        return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Check:
    """A fast path: its name in `kernels.paths`, what runs where it is off, and its computation."""

    path: str
    instead: str
    is_taken: Callable[[Inputs], bool]
    compute: Callable[[Inputs], Sequence[Tensor]]


def prove(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Switch off, on all ranks, the paths that fail on any; why, by path. Collective.

    Rank 0 logs one warning a path. Raises SelfCheckError where nothing can run in its place, and
    for any failure in strict mode.
    """
    mine = failures(model, device, dtype)
    failed = torch.tensor([check.path in mine for check in CHECKS], dtype=torch.int32)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=host_group())
    if not failed.any():
        return {}
    of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine, group=host_group())
    reasons = {}
    for check, is_failed in zip(CHECKS, failed.tolist(), strict=True):
        if not is_failed:
            continue
        rank, found = next((r, f[check.path]) for r, f in enumerate(of_ranks) if check.path in f)
        reasons[check.path] = f"rank {rank}: {found}"
        if strict():
            raise SelfCheckError(f"{check.path}: {reasons[check.path]} (strict mode)")
        switch_off(check.path)
        if dist.get_rank() == 0:
            log.warning("%s", in_words(check.path, reasons[check.path]))
    return reasons


def in_words(path: str, reason: str) -> str:
    """What failed, and what training does about it."""
    instead = next(check.instead for check in CHECKS if check.path == path)
    return f"{path} failed its check on the device: {reason}; on all ranks {instead} instead"


def failures(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return why paths failed here, by path; they are off from then on.

    Raises SelfCheckError where the plain path fails as well.
    """
    outcomes = run_checks(model, device, dtype)
    return {check.path: reason for check, reason in outcomes if reason is not None}


def run_checks(
    model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Check, str | None]]:
    """Check the paths that are taken here; yield why each failed and is now off, or None.

    Sizes and options are those of `model` where kernels are compiled for them. Raises
    SelfCheckError where the plain path fails as well.
    """
    for check in taken(model, device, dtype):
        reason = _failure(check, model, device, dtype)
        if reason is not None:
            switch_off(check.path)
        yield check, reason


def taken(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Return the checks of the paths that this process takes on this device, in this dtype."""
    inputs = _inputs(model, device, dtype)
    with _forgotten():
        return [check for check in CHECKS if check.is_taken(inputs)]


def _failure(
    check: Check, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why the fast path is not to be used, or None."""
    fast: Sequence[Tensor] | str
    with _forgotten():
        try:
            fast = check.compute(_inputs(model, device, dtype))
            _wait(fast)
        except Exception as error:  # whatever compiler, driver and library throw
            _expect_usable(check.path, device, error)
            fast = _first_line(error)
        try:
            with without(check.path):
                plain = check.compute(_inputs(model, device, dtype))
                _wait(plain)
        except Exception as error:
            raise SelfCheckError(
                f"{check.path}: what would run in its place fails as well: {_first_line(error)}"
            ) from error
    return fast if isinstance(fast, str) else _difference(fast, plain)


def _wait(results: Sequence[Tensor]) -> None:
    """For the device, whose errors come late."""
    for result in results:
        result.flatten()[:1].tolist()


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with the results, or None."""
    for one, right in zip(found, expected, strict=True):
        if one.shape != right.shape:
            return f"a result has shape {tuple(one.shape)}, not {tuple(right.shape)}"
        size = float(right.double().norm())
        apart = float((one.double() - right.double()).norm()) / (size or 1.0)
        if not apart <= TOLERANCE:  # NaN too
            return f"results differ by {apart:.1e} of their size, more than {TOLERANCE}"
        apart = _worst_slice(one.double(), right.double())
        if apart > SLICE_TOLERANCE:
            return (
                f"a row or column differs by {apart:.1e} of its size, more than {SLICE_TOLERANCE}"
            )
    return None


def _worst_slice(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a row or column (of a vector, an element), relative to its size or
    to their RMS where that is larger."""
    width = expected.shape[-1] if expected.ndim > 1 else 1
    found, expected = found.reshape(-1, width), expected.reshape(-1, width)
    worst = 0.0
    for dim in (0, 1):
        sizes = expected.norm(dim=dim)
        sizes = sizes.clamp(min=float(sizes.square().mean().sqrt()) or 1.0)
        worst = max(worst, float(((found - expected).norm(dim=dim) / sizes).max()))
    return worst


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _expect_usable(path: str, device: torch.device, error: Exception) -> None:
    """Raises SelfCheckError where the device computes no more, as after an illegal access."""
    try:
        torch.zeros((), device=device).item()
    except Exception as unusable:
        raise SelfCheckError(
            f"{path} left {device} unusable: {_first_line(error)}; start again with"
            " TRANSXSSM_KERNELS=torch"
        ) from unusable


class _forgotten:
    """Within, what `kernels.dispatch` chooses is not remembered as having run."""

    def __enter__(self) -> None:
        self._chosen = {op: set(choices) for op, choices in dispatch.chosen.items()}

    def __exit__(self, *error: object) -> None:
        dispatch.chosen.clear()
        dispatch.chosen.update(self._chosen)


def _inputs(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Inputs:
    return Inputs(model, device, dtype, torch.Generator(device).manual_seed(20))


# -- what is computed ------------------------------------------------------------------------------


def _with_gradients(
    inputs: Inputs, outputs: Tensor | Sequence[Tensor], leaves: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs, and the gradients of the leaves for random gradients of the outputs."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = [inputs.normal(*out.shape).detach().to(out.dtype) for out in outputs]
    found = torch.autograd.grad(outputs, leaves, grads)
    return [out.detach() for out in outputs] + list(found)


def _products(inputs: Inputs) -> list[Tensor]:
    """A weight gradient, added to a matrix inside a flat buffer, and one without a sum so far."""
    rows, hidden, tokens = 40, 64, 96
    with torch.no_grad():
        # gradients of activations are columns of a wider buffer
        g, u = inputs.normal(tokens, 48)[:, :rows], inputs.normal(tokens, hidden)
        flat = inputs.normal(16 + rows * hidden + 16).float() * tokens**0.5
        total = flat[16:-16].view(rows, hidden)
        add_product(total, g.t(), u)
        return [flat, add_product(None, g.t(), u)]


def _cross_entropy(inputs: Inputs) -> list[Tensor]:
    """Loss and gradient of some tokens: of one rank's vocabulary, and of two halves of it."""
    rows, vocabulary = 6, 16_500
    with torch.no_grad():
        logits = inputs.normal(rows, vocabulary) * 3
        labels = torch.tensor([0, 1, 8_191, 8_192, 16_000, 16_489], device=inputs.device)
        weights = torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 1.0], device=inputs.device)
        out = torch.empty_like(weights), torch.empty_like(weights)
        whole = logits.clone()
        cross_entropy_(whole, labels, weights, valid=16_490, out=out, z_loss=1e-2)
        found = [whole, *out]
        half = vocabulary // 2
        halves = [(rank * half, logits[:, rank * half :][:, :half].clone()) for rank in (0, 1)]
        run = implementation_of(choose("cross_entropy", inputs.device, None))
        valid = (half, 16_490 - half)
        statistics = torch.stack([
            run.statistics(part, labels, first, columns)
            for (first, part), columns in zip(halves, valid, strict=True)
        ])  # fmt: skip
        for (first, part), count in zip(halves, valid, strict=True):
            out = torch.empty_like(weights), torch.empty_like(weights)
            run.finish(part, labels, weights, statistics, out, first, count, vocabulary, 0.0, True)
            found += [part, *out]
    return found


def _rms_norm(inputs: Inputs) -> list[Tensor]:
    leaves = h, weight = inputs.normal(70, inputs.model.hidden_size), _weight(inputs)
    return _with_gradients(inputs, rms_norm(h, weight, 1e-5), leaves)


def _weighted_residual(inputs: Inputs) -> list[Tensor]:
    h, update, weight = leaves = *_streams(inputs), _weight(inputs)
    return _with_gradients(inputs, weighted_residual(h, update, weight), leaves)


def _add_rms_norm(inputs: Inputs) -> list[Tensor]:
    leaves = *_streams(inputs), _weight(inputs), _weight(inputs)
    return _with_gradients(inputs, add_rms_norm(*leaves, 1e-5), leaves)


def _streams(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.normal(70, inputs.model.hidden_size), inputs.normal(70, inputs.model.hidden_size)


def _weight(inputs: Inputs) -> Tensor:
    return inputs.normal(inputs.model.hidden_size)


def _swiglu(inputs: Inputs, joined: bool = False) -> list[Tensor]:
    leaves = _beside(inputs, joined, 80, 80)
    return _with_gradients(inputs, swiglu(*leaves), leaves)


def _rotation(inputs: Inputs, joined: bool = False) -> list[Tensor]:
    model = inputs.model
    heads = (2, 1, 1) if model.num_kv_heads < model.num_heads else (1, 1, 1)
    leaves = _beside(inputs, joined, *(n * model.head_dim for n in heads))
    q, k, v = (leaf.view(ROWS, LENGTH, -1, model.head_dim) for leaf in leaves)
    rotated = rotate_qkv(q, k, v, *inputs.tables(model.head_dim), inplace=False)
    return _with_gradients(inputs, rotated, leaves)


def _one_rotation(inputs: Inputs) -> list[Tensor]:
    q = inputs.normal(ROWS, LENGTH, 2, inputs.model.head_dim)
    return _with_gradients(inputs, apply_rope(q, *inputs.tables(inputs.model.head_dim)), [q])


def _scan(
    inputs: Inputs, joined: bool = False, heads: int = 2, length: int = LENGTH
) -> list[Tensor]:
    """Of so few heads, if no others are given, that programs of whole rows do not fill a GPU."""
    model, device = inputs.model, inputs.device
    groups = heads if model.ssd_groups == model.num_heads else heads // 2
    state = groups * model.state_dim
    widths = heads * model.head_dim, state, state, heads
    x, b, c, dt = leaves = _beside(inputs, joined, *widths, length=length)
    rows = (ROWS, length)
    A_log = torch.linspace(1, 8, heads, device=device).log().requires_grad_()
    dt_bias = torch.full((heads,), -3.0, device=device).requires_grad_()
    cos, sin = (None, None)
    if model.rope == "unified":
        cos, sin = inputs.tables(model.state_dim, length)
    boundaries = [0, 37, length, length + 64, 2 * length]  # documents end inside of chunks
    y, state_at_end = ssd_from_log(
        x.view(*rows, heads, -1), dt.view(*rows, heads), A_log, b.view(*rows, groups, -1),
        c.view(*rows, groups, -1), cos=cos, sin=sin, dt_bias=dt_bias,
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32, device=device),
        chunk_size=model.chunk_size,
    )  # fmt: skip
    # of half their squares: for random ones the gradient of dt_bias would be what rounding leaves
    found = torch.autograd.grad((y, state_at_end), [*leaves, A_log, dt_bias], (y, state_at_end))
    return [y.detach(), state_at_end.detach(), *found]


def _scans(inputs: Inputs) -> list[Tensor]:
    """Of few heads, and on a GPU also of so many that programs of whole rows fill it."""
    found = _scan(inputs)
    if inputs.device.type == "cuda":
        found += _scan(inputs, heads=2 * current_target().num_sms)
    return found


def _segments(inputs: Inputs) -> list[Tensor]:
    """Long rows of heads that are some programs too few for a GPU, so that rows are cut."""
    return _scan(inputs, heads=2 * (current_target().num_sms // 6), length=800)


def _slices(inputs: Inputs) -> list[Tensor]:
    return [
        *_swiglu(inputs, joined=True),
        *_rotation(inputs, joined=True),
        *_scan(inputs, joined=True),
    ]


def _beside(inputs: Inputs, joined: bool, *widths: int, length: int = LENGTH) -> tuple[Tensor, ...]:
    """Leaves [T, 1, widthᵢ] of ROWS rows: `joined` as a projection gives them."""
    tokens = ROWS * length
    if not joined:
        return tuple(inputs.normal(tokens, 1, width) for width in widths)
    width = sum(widths)
    buffer = inputs.normal(tokens, 1, width + -width % 16).detach()
    return tuple(part.detach().requires_grad_() for part in columns(buffer, widths))


def _in_triton(op: str) -> Callable[[Inputs], bool]:
    return lambda inputs: choose(op, inputs.device, None) == "triton"


def _cuts_rows(inputs: Inputs) -> bool:
    """Only on a GPU: the interpreter would take minutes for as many programs."""
    return inputs.device.type == "cuda" and _in_triton("ssd")(inputs)


def _sums_inside(inputs: Inputs) -> bool:
    return inputs.dtype != torch.float32 and can_sum_inside(inputs.device)


_TORCH = "PyTorch runs it"
CHECKS = [
    Check(
        FLOAT32_SUMS, "weight gradients are rounded before they are summed", _sums_inside, _products
    ),
    Check("cross_entropy", _TORCH, _in_triton("cross_entropy"), _cross_entropy),
    Check("rms_norm", _TORCH, _in_triton("rms_norm"), _rms_norm),
    Check("weighted_residual", _TORCH, _in_triton("weighted_residual"), _weighted_residual),
    Check("add_rms_norm", _TORCH, _in_triton("add_rms_norm"), _add_rms_norm),
    Check("swiglu", _TORCH, _in_triton("swiglu"), _swiglu),
    Check("rotate_qk", _TORCH, _in_triton("rotate_qk"), _rotation),
    Check("apply_rope", _TORCH, _in_triton("apply_rope"), _one_rotation),
    Check("ssd", _TORCH, _in_triton("ssd"), _scans),
    Check(SCAN_SEGMENTS, "rows of the scan are not cut", _cuts_rows, _segments),
    Check(COLUMN_SLICES, "kernels read copies", _in_triton("ssd"), _slices),
]
