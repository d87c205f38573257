"""Packed attention against a float64 softmax written out."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention as module
from kernels.attention import attention
from kernels.recording import recording

DOCUMENTS = {
    "rows": [0, 24, 48],
    "packed": [0, 1, 2, 17, 24, 30, 48],
    "one-token-each": list(range(49)),
}


def naive(q, k, v, borders, scale=None):
    """Every pair of tokens, float64."""
    batch, length, heads, dim = q.shape
    q, k, v = (t.double().flatten(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    token = torch.arange(batch * length)
    document = torch.bucketize(token, torch.tensor(borders[1:]), right=True)
    seen = (document[:, None] == document) & (token[:, None] >= token)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (scale or dim**-0.5)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).view(batch, length, heads, dim)


def make(kv_heads=4, dtype=torch.float32):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return [
        torch.randn(2, 24, heads, 16, generator=generator).to(dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("borders", DOCUMENTS.values(), ids=DOCUMENTS)
def test_matches_naive(borders, kv_heads, dtype):
    tensors = make(kv_heads, dtype)
    found = attention(*tensors, torch.tensor(borders, dtype=torch.int32))
    expected = naive(*tensors, borders)
    assert found.dtype == dtype
    weight = torch.randn(
        found.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(1)
    ).to(dtype)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    )
    torch.testing.assert_close(found.double(), expected, **tolerance)
    grads = torch.autograd.grad(found, tensors, weight)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, tensors, weight), strict=True):
        torch.testing.assert_close(grad, wanted, **tolerance)


class _Lengths(TorchDispatchMode):
    """Collects the lengths of the rows that SDPA is called with."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.__name__ and "backward" not in func.__name__:
            self.seen.add(args[0].shape[2])
        return func(*args, **(kwargs or {}))


def test_documents_of_all_sizes_share_a_few_products_in_16_bits():
    with torch.device("cpu"), _Lengths() as lengths:
        for size in range(1, 200):
            q = torch.randn(1, 300, 2, 8).bfloat16()
            attention(q, q, q, torch.tensor([0, size, 300], dtype=torch.int32))
    assert lengths.seen == {64, 128, 192, 256, 320}


def test_scale_is_used():
    tensors = make()
    borders = DOCUMENTS["packed"]
    found = attention(*tensors, torch.tensor(borders, dtype=torch.int32), scale=0.5)
    torch.testing.assert_close(found.double(), naive(*tensors, borders, 0.5), rtol=1e-5, atol=1e-5)


def test_documents_ignore_each_other_bitwise():
    borders = torch.tensor([0, 10, 24, 48], dtype=torch.int32)
    outputs = []
    for factor in (1.0, 3.7):
        tensors = [t.detach().clone() for t in make(2)]
        for t in tensors:
            t[0, :10] *= factor
            t.requires_grad_()
        out = attention(*tensors, borders)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        outputs.append([t.flatten(0, 1)[10:] for t in (out, *grads)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize(
    ("position", "bad", "error", "says"),
    [
        (0, torch.zeros(2, 24, 16), ValueError, "q has shape"),
        (0, torch.zeros(2, 24, 4, 16, dtype=torch.int32), TypeError, "q has dtype"),
        (1, torch.zeros(2, 24, 3, 16), ValueError, "k has shape .* Hkv dividing 4 query heads"),
        (1, torch.zeros(2, 24, 4, 16).bfloat16(), TypeError, "k has dtype torch.bfloat16"),
        (2, torch.zeros(2, 24, 2, 16), ValueError, "v has shape"),
        (3, torch.tensor([0, 48]), ValueError, "cu_seqlens has shape .* each of 2 rows"),
        (3, torch.tensor([0.0, 24, 48]), TypeError, "cu_seqlens has dtype"),
        (3, torch.tensor([0, 24, 48], device="meta"), ValueError, "cu_seqlens is on meta"),
    ],
)
def test_bad_input_is_named(position, bad, error, says):
    arguments = [*make(), torch.tensor([0, 24, 48])]
    arguments[position] = bad
    with pytest.raises(error, match=says):
        attention(*arguments)


# -- the custom operator of CPUs -------------------------------------------------------------------


@pytest.fixture
def on_cpu():
    """Tensors of this test are on the CPU, also where the tests run on a GPU."""
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "borders", [DOCUMENTS["packed"], DOCUMENTS["one-token-each"], [0, 24, 24, 48, 48, 48]]
)
def test_as_an_operator_it_is_the_same_bit_for_bit(borders, kv_heads, scale, dtype, on_cpu):
    tensors, given = make(kv_heads, dtype), torch.tensor(borders, dtype=torch.int32)
    plain = attention(*tensors, given, scale=scale)
    with recording():
        whole = attention(*tensors, given, scale=scale)
    assert torch.equal(whole, plain)
    weight = torch.randn(plain.shape).to(dtype)
    expected = torch.autograd.grad(plain, tensors, weight)
    for found, wanted in zip(torch.autograd.grad(whole, tensors, weight), expected, strict=True):
        assert torch.equal(found, wanted)


def test_packed_attention_compiles_without_a_graph_break(on_cpu):
    """One compiled call serves other documents."""
    tensors = make(2)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for borders in ([0, 5, 24, 48], [0, 24, 30, 48]):
        given = torch.tensor(borders, dtype=torch.int32)
        plain, found = attention(*tensors, given), compiled(*tensors, given)
        assert torch.equal(found, plain)
        expected = torch.autograd.grad(plain.sum(), tensors)
        for grad, wanted in zip(torch.autograd.grad(found.sum(), tensors), expected, strict=True):
            assert torch.equal(grad, wanted)


def test_the_operator_is_registered_as_pytorch_wants_it(on_cpu):
    q, k, v = (t.flatten(0, 1) for t in make(2))
    torch.library.opcheck(module._forward, (q, k, v, torch.tensor([0, 5, 24, 48]), None))
