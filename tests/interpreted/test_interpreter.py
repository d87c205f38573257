"""The interpreter computes what torch computes: bit by bit for bfloat16, and as hardware does."""

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.audit.interpreter import install
from kernels.target import interpreting


def every_bfloat16(seed: int) -> Tensor:
    """All 65,536 bit patterns, shuffled: infinities, NaNs and denormals too."""
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(seed))
    return (order - (1 << 15)).to(torch.int16).view(torch.bfloat16)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """The same dtype and bits; any NaN is as good as another."""
    assert found.dtype == expected.dtype
    found, expected = (x.where(x == x, float("nan")) for x in (found, expected))
    assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


@triton.jit
def _binary(X, Y, OUT, OP: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x, y = tl.load(X + lane), tl.load(Y + lane)
    if OP == "add":
        out = x + y
    elif OP == "subtract":
        out = x - y
    elif OP == "multiply":
        out = x * y
    elif OP == "divide":
        out = x / y
    elif OP == "fma":
        out = tl.fma(x, y, x)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "select":
        out = tl.where(x < y, x, y)
    elif OP == "equal":
        out = (x == y).to(tl.bfloat16)
    elif OP == "absolute":
        out = tl.abs(x)
    elif OP == "negate":
        out = -x
    elif OP == "constant":
        out = x * 0.1 + 1
    elif OP == "filled":
        out = x - tl.full((N,), 0.1, tl.bfloat16) * tl.zeros((N,), tl.bfloat16)
    elif OP == "bitcast":
        out = (x.to(tl.int16, bitcast=True) ^ 1).to(tl.bfloat16, bitcast=True)
    tl.store(OUT + lane, out)


TENTH = torch.tensor(0.1, dtype=torch.bfloat16)  # constants take the tensor's dtype
BINARY = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "fma": lambda x, y: (x.double() * y.double() + x.double()).bfloat16(),
    "maximum": lambda x, y: torch.where(x.isnan() | (y > x), y, x),  # the number, not the NaN
    "minimum": lambda x, y: torch.where(x.isnan() | (y < x), y, x),
    "select": lambda x, y: torch.where(x < y, x, y),
    "equal": lambda x, y: (x == y).bfloat16(),
    "absolute": lambda x, y: x.abs(),
    "negate": lambda x, y: -x,
    "constant": lambda x, y: x * TENTH + 1,
    "filled": lambda x, y: x - TENTH * 0,
    "bitcast": lambda x, y: (x.view(torch.int16) ^ 1).view(torch.bfloat16),
}


@pytest.mark.parametrize("op", BINARY)
def test_bfloat16_arithmetic_is_torchs_bit_by_bit(op):
    x, y = every_bfloat16(1), every_bfloat16(2)
    out = torch.empty_like(x)
    _binary[(1,)](x, y, out, op, x.numel())
    assert_same(out, BINARY[op](x, y))


@triton.jit
def _cast(X, OUT, ROUNDING: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x = tl.load(X + lane)
    tl.store(OUT + lane, x.to(OUT.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def _cast_to(x: Tensor, dtype: torch.dtype, rounding: str | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, out, rounding, x.numel())
    return out


@pytest.mark.parametrize("rounding", [None, "rtne"])
def test_float32_to_bfloat16_rounds_to_nearest_even(rounding):
    exact = every_bfloat16(3).float().view(torch.int32)
    # Exact, just above, just below a tie, ties, just above one, just below the next value.
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (exact | low).view(torch.float32)
        assert_same(_cast_to(x, torch.bfloat16, rounding), x.bfloat16())


def test_float32_to_bfloat16_truncates_when_asked():
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32)
    bits = bits[~bits.view(torch.float32).isnan()][:2048]
    expected = (bits & -(1 << 16)).view(torch.float32).bfloat16()
    assert_same(_cast_to(bits.view(torch.float32), torch.bfloat16, "rtz"), expected)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.int32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_other_casts(source, target):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).mul(3000).to(source)
    assert_same(_cast_to(x, target), x.to(target))


@triton.jit
def _scale(X, OUT, factor, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(OUT + lane, tl.load(X + lane) * factor)


def test_a_float_argument_is_float32():
    x = torch.randn(64).bfloat16()
    out = torch.empty(64)
    _scale[(1,)](x, out, 0.1, 64)
    assert_same(out, x.float() * 0.1)


@triton.jit
def _product(X, Y, OUT, PRECISION: tl.constexpr, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(X + row * N + column), tl.load(Y + row * N + column)
    total = tl.full((N, N), 1.0, tl.float32)
    tl.store(OUT + row * N + column, tl.dot(x, tl.trans(y), total, input_precision=PRECISION))


@pytest.mark.parametrize(
    ("dtype", "precision", "low", "high"),
    [
        (torch.bfloat16, None, 0, 1e-6),
        (torch.float16, None, 0, 1e-6),
        (torch.float32, "ieee", 0, 1e-6),
        (torch.float32, "tf32", 1e-4, 2e-3),
        (torch.float32, None, 1e-4, 2e-3),  # tf32 is Triton's default
    ],
    ids=str,
)
def test_products_sum_exact_products_in_float32(dtype, precision, low, high):
    x, y = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(64, 64)
    _product[(1,)](x, y, out, precision, 64)
    expected = 1 + x.double() @ y.double().T
    error = ((out - expected).norm() / expected.norm()).item()
    assert low <= error < high


def test_a_product_that_the_compiler_refuses_is_refused():
    x = torch.zeros(8, 8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="K >= 16"):
        _product[(1,)](x, x, torch.empty(8, 8), None, 8)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b * d


@triton.jit
def _reductions(X, SUM, MAX, MIN, ARGMAX, PAIR, CUMSUM, SCAN, REVERSE: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    row, column = tl.arange(0, M), tl.arange(0, N)
    at = row[:, None] * N + column[None, :]
    x = tl.load(X + at)
    tl.store(SUM + row, tl.sum(x, 1))
    tl.store(MAX + column, tl.max(x, 0))
    tl.store(MIN, tl.min(x))
    tl.store(ARGMAX + row, tl.argmax(x, 1))
    total, _ = tl.reduce((x, x), 0, _add_pairs)
    tl.store(PAIR + column, total)
    tl.store(CUMSUM + at, tl.cumsum(x, 0, reverse=REVERSE))
    _, product = tl.associative_scan((x, x), 1, _add_pairs, reverse=REVERSE)
    tl.store(SCAN + at, product)


def tree(x: Tensor, dim: int) -> Tensor:
    """Sum in x's dtype, neighbours first."""
    while x.shape[dim] > 1:
        even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
        x = even + odd
    return x.squeeze(dim)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reductions_and_scans(dtype, reverse):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, columns = torch.empty(16, dtype=dtype), torch.empty(2, 32, dtype=dtype)
    least, where = torch.empty(1, dtype=dtype), torch.empty(16, dtype=torch.int32)
    running, product = torch.empty(16, 32), torch.empty(16, 32, dtype=dtype)
    _reductions[(1,)](
        x, rows, columns[0], least, where, columns[1], running, product, reverse, 16, 32
    )
    if dtype == torch.float32:
        torch.testing.assert_close(rows, x.sum(1), rtol=1e-6, atol=1e-6)
    else:  # every addition rounds
        assert_same(rows, tree(x, 1))
    assert_same(columns[0], x.amax(0))
    assert_same(columns[1], tree(x, 0))
    assert_same(least, x.min().reshape(1))
    assert_same(where, x.argmax(1).int())
    order = x.flip(0, 1) if reverse else x
    summed, multiplied = order.float().cumsum(0), order.double().cumprod(1)
    if reverse:
        summed, multiplied = summed.flip(0, 1), multiplied.flip(0, 1)
    precision = 5 * torch.finfo(dtype).eps  # five roundings along the tree
    tolerance = 1e-6 if dtype != torch.float16 else 2e-2  # float16 is not promoted
    torch.testing.assert_close(running, summed, rtol=tolerance, atol=tolerance)
    # float16's denormals round coarsely
    torch.testing.assert_close(product.double(), multiplied, rtol=precision, atol=1e-6)


@triton.jit
def _transcendental(X, OUT, N: tl.constexpr):
    lane = tl.arange(0, N)
    x = tl.load(X + lane)
    tl.store(OUT + lane, tl.log2(1 + tl.exp2(x)) + tl.log(1 + tl.exp(x)) + tl.sigmoid(x))


def test_float32_functions():
    x = torch.linspace(-20, 20, 256)
    out = torch.empty_like(x)
    _transcendental[(1,)](x, out, 256)
    wide = x.double()
    expected = (1 + wide.exp2()).log2() + (1 + wide.exp()).log() + wide.sigmoid()
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@triton.autotune([triton.Config({"ADD": 3}), triton.Config({"ADD": 5})], key=["N"])
@triton.jit
def _tuned(X, N: tl.constexpr, ADD: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(X + lane, tl.load(X + lane) + ADD)


def test_autotuning_takes_the_first_configuration_and_runs_once():
    x = torch.zeros(16)
    _tuned[(1,)](x, 16)
    assert_same(x, torch.full((16,), 3.0))


@triton.jit
def _asserting(X, limit, N: tl.constexpr):
    x = tl.load(X + tl.arange(0, N))
    tl.device_assert(x < limit, "x reaches the limit")


def test_device_assert_fires():
    _asserting[(1,)](torch.arange(16), 16, 16)
    with pytest.raises(AssertionError, match="x reaches the limit"):
        _asserting[(1,)](torch.arange(16), 15, 16)


@triton.jit
def _integer(X, Y, OUT, OP: tl.constexpr):
    x, y = tl.load(X), tl.load(Y)
    out = x + y if OP == "add" else x - y if OP == "subtract" else x * y
    tl.store(OUT, out)


@pytest.mark.parametrize(
    ("op", "x", "y"),
    [("add", 2**31 - 2, 1), ("subtract", 1 - 2**31, 1), ("multiply", 2**15, -(2**16))],
)
def test_integer_overflow_is_an_error(op, x, y):
    y, out = torch.tensor([y, 2 * y]), torch.zeros(1, dtype=torch.int64)
    _integer[(1,)](torch.tensor([x]).int(), y[:1].int(), out, op)
    expected = {"add": x + y, "subtract": x - y, "multiply": x * y}[op]
    assert out == expected[0]
    with pytest.raises(OverflowError, match=f"int32 overflow in {op}"):
        _integer[(1,)](torch.tensor([x]).int(), y[1:].int(), out, op)
    _integer[(1,)](torch.tensor([x]), y[1:], out, op)  # int64
    assert out == expected[1]


def test_an_untried_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    with pytest.raises(RuntimeError, match=r"Triton 3\.99\.0: .* install Triton 3\.8\.0"):
        install()


def test_a_process_that_does_not_interpret_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    interpreting.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Python starts"):
            install()
    finally:
        interpreting.cache_clear()


def test_a_late_environment_variable_is_refused():
    program = (
        "import os; os.environ.pop('TRITON_INTERPRET'); import triton;"
        "os.environ['TRITON_INTERPRET'] = '1';"
        "from kernels.audit.interpreter import install; install()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "RuntimeError: triton was imported before TRITON_INTERPRET=1 was set" in done.stderr
