"""Frequencies against Hugging Face transformers, the rotation against its float64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kernels.rope import blocked
from kernels.rope.naive import apply_rope_naive
from kernels.rope.rope import apply_rope, rotate_qk, rotate_qkv
from kernels.rope.table import inverse_frequencies, rotary_cos_sin
from kernels.slices import shared_stride
from tests.kernels.operation_cases import (
    DTYPES,
    TOLERANCE,
    assert_matches,
    assert_repeatable,
    normal,
    outputs_and_gradients,
    side_by_side,
)
from tests.kernels.scan_cases import relative_error

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALINGS = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear-legacy-key": {"type": "linear", "factor": 2.0},
    "yarn": YARN,
    "yarn-betas": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-attention-factor": YARN | {"attention_factor": 1.5},
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_match_transformers(scaling, theta, dim):
    kind = scaling.get("rope_type", scaling.get("type"))
    config = PretrainedConfig(
        rope_theta=theta, head_dim=dim, hidden_size=4 * dim, num_attention_heads=4,
        max_position_embeddings=8192, rope_scaling=scaling or None,
    )  # fmt: skip
    if kind is None:
        expected, magnitude = 1 / theta ** (torch.arange(0, dim, 2).double() / dim), 1.0
    else:
        expected, magnitude = ROPE_INIT_FUNCTIONS[kind](config, torch.get_default_device())
    found, factor = inverse_frequencies(dim, theta, scaling)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=2e-6, atol=0)
    assert factor == pytest.approx(magnitude)


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "'dynamic' is not offered: .* packed document .* context parallelism",
        ),
        ({"rope_type": "longrope"}, "use one of default, linear, yarn, llama3"),
        ({"factor": 2.0}, "rope_scaling.rope_type=None"),
        ({"rope_type": "linear"}, "rope_scaling.factor=None must be given"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings=None"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor=1.0 must exceed"),
    ],
)
def test_bad_scaling_is_named(scaling, says):
    with pytest.raises(ValueError, match=says):
        inverse_frequencies(64, 10000.0, scaling)


def test_bad_dim_and_theta_are_named():
    with pytest.raises(ValueError, match="dim=7 must be even"):
        inverse_frequencies(7, 10000.0, {})
    with pytest.raises(ValueError, match=r"rope_theta=0\.5"):
        inverse_frequencies(8, 0.5, {})


def test_table_is_exact_at_far_positions():
    position = torch.tensor([[0, 1, 1_000_003]])
    cos, sin = rotary_cos_sin(position, 8, 10000.0, YARN)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (1, 3, 4)
    inv_freq, magnitude = inverse_frequencies(8, 10000.0, YARN)
    angle = position.double()[..., None] * inv_freq
    torch.testing.assert_close(cos, (magnitude * angle.cos()).float())
    torch.testing.assert_close(sin, (magnitude * angle.sin()).float())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float64, 1e-12)],
    ids=["fp32", "bf16", "fp64"],
)
def test_rotation_matches_naive(dtype, tolerance):
    q = torch.randn(
        2, 9, 3, 16, generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    ).to(dtype)
    cos, sin = rotary_cos_sin(torch.arange(9).expand(2, 9), 16, 100.0, {})
    found = apply_rope(q, cos, sin)
    assert found.dtype == dtype
    expected = apply_rope_naive(q, cos, sin)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_backward_is_the_inverse_rotation():
    q = torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_cos_sin(torch.arange(5)[None], 8, 100.0, {})
    torch.autograd.gradcheck(lambda t: apply_rope(t, cos, sin), [q])
    rotated = apply_rope(q, cos, sin)
    (grad,) = torch.autograd.grad(rotated, q, rotated.detach())
    torch.testing.assert_close(grad, q.detach(), rtol=1e-6, atol=1e-6)  # Rᵀ R = 1


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    scores = []
    for shift in (0, 500):
        tables = [rotary_cos_sin(torch.tensor([[p + shift]]), 32, 1e4, {}) for p in (7, 3)]
        scores.append((apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def tables(batch: int, length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents of 7 tokens, and each row elsewhere in them."""
    position = (torch.arange(length) + torch.arange(batch)[:, None]) % 7
    return rotary_cos_sin(position, dim, 100.0, {})


def queries_and_keys(batch, length, q_heads, k_heads, dim, dtype=torch.float32):
    shapes = (batch, length, q_heads, dim), (batch, length, k_heads, dim)
    return [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def rotations(batch: int, length: int, dim: int):
    """The operation and its oracle with tables filled in."""
    cos, sin = tables(batch, length, dim)
    return (
        lambda q, k: rotate_qk(q, k, cos, sin),
        lambda q, k: [apply_rope_naive(t, cos, sin) for t in (q, k)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 9, 4, 2, 16), (1, 1, 1, 1, 2), (3, 5, 3, 1, 6)], ids=str)
def test_queries_and_keys_match_naive(size, dtype):
    assert_matches(*rotations(size[0], size[1], size[4]), queries_and_keys(*size, dtype=dtype))


@pytest.mark.parametrize("block", [1, 40, 100, 1000])
def test_any_block_of_tokens(block, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)
    assert_matches(*rotations(3, 7, 8), queries_and_keys(3, 7, 4, 1, 8))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 20), group=st.integers(1, 4),
    k_heads=st.integers(1, 3), half=st.integers(1, 20),
)  # fmt: skip
def test_any_shape(batch, length, group, k_heads, half):
    size = (batch, length, group * k_heads, k_heads, 2 * half)
    assert_matches(*rotations(batch, length, 2 * half), queries_and_keys(*size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_one_projection(dtype):
    heads = normal(2, 9, 8, 16, dtype=dtype)
    assert_matches(*rotations(2, 9, 16), heads.split((6, 2), dim=2))
    time_first = heads.transpose(0, 1)  # as Megatron-core lays tokens out
    assert_matches(*rotations(9, 2, 16), time_first.split((6, 2), dim=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype):
    cos, sin = tables(2, 9, 16)
    q, k = queries_and_keys(2, 9, 4, 2, 16, dtype=dtype)
    expected = rotate_qk(q, k, cos, sin)
    packed = torch.cat((q, k), dim=2)
    views = packed.split((4, 2), dim=2)
    assert all(
        a is b for a, b in zip(rotate_qk(*views, cos, sin, inplace=True), views, strict=True)
    )
    assert torch.equal(packed, torch.cat(expected, dim=2))


def test_in_place_has_the_same_gradient():
    rotate, naive = rotations(1, 5, 8)
    cos, sin = tables(1, 5, 8)

    def overwrite(q, k):
        return rotate_qk(q * 1, k * 1, cos, sin, inplace=True)

    inputs = queries_and_keys(1, 5, 2, 1, 8)
    assert_matches(overwrite, naive, inputs)
    assert_repeatable(rotate, inputs)


def test_naive_can_be_forced(monkeypatch):
    monkeypatch.setenv("TRANSXSSM_KERNELS", "naive")
    assert_matches(*rotations(2, 9, 16), queries_and_keys(2, 9, 4, 2, 16, dtype=torch.bfloat16))
    cos, sin = tables(2, 9, 16)
    q, k = queries_and_keys(2, 9, 4, 2, 16)
    exact = apply_rope_naive(q, cos, sin)
    rotate_qk(q, k, cos, sin, inplace=True)
    assert relative_error(q, exact) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("name", "bad", "error", "says"),
    [
        ("q", torch.zeros(2, 5, 8), ValueError, r"q has shape \(2, 5, 8\); expected \[B"),
        ("q", torch.zeros(2, 5, 2, 7), ValueError, "q has shape .* D even"),
        ("q", torch.zeros(2, 5, 2, 8).int(), TypeError, "q has dtype torch.int32"),
        ("q", torch.zeros(2, 5, 8, 2).mT, ValueError, r"q has strides .*\(pass q\.contiguous\(\)"),
        ("k", torch.zeros(2, 4, 1, 8), ValueError, r"k has shape .*; expected \(2, 5, 1, 8\)"),
        ("k", torch.zeros(2, 5, 1, 8).half(), TypeError, "k has dtype torch.float16"),
        ("k", torch.zeros(2, 5, 1, 8, device="meta"), ValueError, "k is on meta; expected c"),
        ("cos", torch.zeros(2, 5, 8), ValueError, r"cos has shape .*; expected \(2, 5, 4\)"),
        ("sin", torch.zeros(2, 5, 4).double(), TypeError, "sin has dtype torch.float64"),
    ],
)  # fmt: skip
def test_bad_queries_and_keys_are_named(name, bad, error, says):
    good = {
        "q": torch.zeros(2, 5, 2, 8), "k": torch.zeros(2, 5, 1, 8),
        "cos": torch.zeros(2, 5, 4), "sin": torch.zeros(2, 5, 4),
    }  # fmt: skip
    with pytest.raises(error, match=says):
        rotate_qk(**(good | {name: bad}))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda k: k.requires_grad_(), "k is a leaf that requires grad"),
        (lambda k: (k.requires_grad_() * 1)[:, :, :1], "k is a view that requires grad"),
        (lambda k: k[:, :, :1].expand(2, 5, 3, 8), "k is expanded"),
    ],
)
def test_what_cannot_be_overwritten_is_named(make, says):
    table = torch.zeros(2, 5, 4)
    k = make(torch.zeros(2, 5, 2, 8))
    with pytest.raises(ValueError, match=f"{says}.*inplace=False"):
        rotate_qk(torch.zeros(2, 5, 2, 8), k, table, table, inplace=True)


def test_bad_rotation_input_is_named():
    table = torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match=r"q has shape \(2, 5, 8\)"):
        apply_rope(torch.zeros(2, 5, 8), table, table)
    with pytest.raises(ValueError, match=r"sin has shape \(2, 5, 3\); expected \(2, 5, 4\)"):
        apply_rope(torch.zeros(2, 5, 1, 8), table, table[..., :3])
    with pytest.raises(TypeError, match="q has dtype"):
        apply_rope(torch.zeros(2, 5, 1, 8, dtype=torch.int64), table, table)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_one_buffer(dtype, inplace):
    """Values pass; gradients lie in one buffer, whatever attention gives."""
    q, k = queries_and_keys(2, 9, 4, 2, 16, dtype=dtype)
    v = normal(2, 9, 2, 16, dtype=dtype, seed=3)
    cos, sin = tables(2, 9, 16)

    def operation(*given):
        # as projections give them: neither leaves nor views
        given = [torch.ops.aten._unsafe_view(t * 1, t.shape) for t in given] if inplace else given
        return rotate_qkv(*given, cos, sin, inplace=inplace)

    contiguous = outputs_and_gradients(operation, (q, k, v))
    expected = outputs_and_gradients(lambda *t: rotate_qk(*t, cos, sin), (q, k))
    assert all(torch.equal(a, b) for a, b in zip(contiguous[:2], expected[:2], strict=True))
    assert torch.equal(contiguous[2], v)
    columns = side_by_side((q, k, v), rest=3)
    found = outputs_and_gradients(lambda *t: rotate_qkv(*t, cos, sin), columns)
    assert all(torch.equal(a, b) for a, b in zip(found, contiguous, strict=True))
    assert shared_stride(found[3:]) == columns[0].stride(1)
