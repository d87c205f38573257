"""The Triton scan against the float64 recurrence: outputs, final state and every gradient."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.rope.naive import apply_rope_naive
from kernels.slices import shared_stride
from kernels.ssd import fused, tiles
from kernels.ssd.choice import choose_shape
from kernels.ssd.naive import ssd_naive
from kernels.ssd.shapes import Problem, Shape, segmented
from kernels.ssd.ssd import ssd, ssd_from_log
from kernels.ssd.tables import scan_tables
from kernels.ssd.tuning import fastest, run_scan
from kernels.ssd.tuning import make_inputs as make_tuned
from kernels.target import Target
from tests.kernels.operation_cases import side_by_side
from tests.kernels.scan_cases import (
    DIFFERENTIABLE,
    assert_close,
    make_inputs,
    relative_error,
    run,
)

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["fused", "segmented", "split"])
def shape(request, monkeypatch):
    """Every shape of the algorithm, whatever the size of the GPU."""
    monkeypatch.setattr(fused, "choose_shape", lambda *args: shape_of(request.param, *args))
    return request.param


def shape_of(kind, problem, tile, target, backward, _may_segment=True):
    """Of that kind where it can be: short rows are not cut, groups' gradients are split."""
    shared = problem.per_group > 1
    if kind == "split" or (backward and shared):
        pairs = shared and tile.p_block == problem.head_dim
        return Shape("split", problem.per_group, span=2 if pairs else 1)
    chunks = -(-problem.length // tile.chunk)
    if kind == "segmented" and chunks >= 3:
        return segmented(chunks, min(chunks, 4), 2 if shared else 1)
    return Shape("fused", 2 if shared else 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "size",
    [(2, 1, 2, 16, 16), (1, 63, 2, 32, 16), (2, 65, 2, 16, 32), (1, 200, 2, 64, 64)],
    ids=lambda size: "B{}-L{}-H{}-P{}-N{}".format(*size),
)
def test_matches_recurrence(size, dtype, shape):
    documents = [d for d in (1, 5, 64, 130) if d < size[1]]
    inputs = make_inputs(*size, dtype=dtype, documents=documents)
    assert_close(run(ssd, inputs), run(ssd_naive, inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("size", [(1, 130, 1, 128, 128), (1, 70, 2, 128, 32), (1, 70, 2, 16, 128)])
def test_wide_and_unequal(size, shape):
    inputs = make_inputs(*size, dtype=torch.bfloat16, documents=[40])
    # d_A_log is small beside its terms here: rounding RoPE(B) and RoPE(C), as every 16-bit scan
    # does, moves it by 8 % in one case, so it is compared with a recurrence over the rounded ones.
    rotated = {
        name: apply_rope_naive(inputs[name], inputs["cos"], inputs["sin"]).bfloat16()
        for name in ("B", "C")
    }
    plain = {name: value for name, value in inputs.items() if name not in ("cos", "sin")}
    rounded = run(lambda **a: ssd_naive(cos=None, sin=None, **a), plain | rotated)
    expected = run(ssd_naive, inputs) | {"d_A_log": rounded["d_A_log"]}
    assert_close(run(ssd, inputs), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (4, 4), (3, 1), (6, 2)])
def test_groups(heads, groups, shape):
    inputs = make_inputs(2, 50, heads, groups=groups, documents=[7, 8, 31])
    assert_close(run(ssd, inputs), run(ssd_naive, inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("groups", [1, 3])
def test_groups_in_16_bits(groups, shape):
    inputs = make_inputs(1, 200, 3, groups=groups, documents=[70, 131], dtype=torch.bfloat16)
    assert_close(run(ssd, inputs, 32), run(ssd_naive, inputs), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("border", [31, 32, 33, 40, 47, 48, 49])
def test_document_starts_anywhere_around_segments(border, monkeypatch):
    """Chunks 0 and 1, 2, 3 and 4: segments begin at tokens 32 and 48."""
    inputs = make_inputs(1, 75, heads=1, documents=[border])
    cut = segmented(5, 3, 1)
    assert [cut.chunks_of(n, 5) for n in range(3)] == [range(2), range(2, 3), range(3, 5)]
    monkeypatch.setattr(fused, "choose_shape", lambda *_: cut)
    assert_close(run(ssd, inputs, 16), run(ssd_naive, inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("segments", [3, 5, 7])
def test_states_cross_every_segment(segments, monkeypatch):
    """Slow decays: the initial state reaches the last token, and dS the first one."""
    inputs = make_inputs(1, 112, heads=2, A=[-0.01, -0.02])
    monkeypatch.setattr(fused, "choose_shape", lambda *_: segmented(7, segments, 1))
    assert_close(run(ssd, inputs, 16), run(ssd_naive, inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logarithms_of_decays(dtype, shape):
    inputs = make_inputs(2, 90, heads=3, groups=1, documents=[33], dtype=dtype)
    # not -1, whose logarithm is 0
    inputs["A"] = (inputs["A"] - 0.5).neg().log().to(dtype)

    def of_log(scan):
        def called(x, dt, A, B, C, *, output_final_state, **rest):
            return scan(x, dt, A, B, C, rest)

        return called

    found = run(of_log(lambda *a: ssd_from_log(*a[:5], **a[5])), inputs)
    expected = run(
        of_log(
            lambda x, dt, A, B, C, rest: ssd_naive(
                x, dt, -A.double().exp(), B, C, output_final_state=True, **rest
            )
        ),
        inputs,
    )
    for results in (found, expected):  # `run` takes the gradient for that of A
        results["d_A_log"] = results["d_A_log"] / inputs["A"]
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_of_shared_inputs_are_summed_in_float32(dtype, shape):
    """Every document is a token, Δ is 1 and x·dy an integer: each head's gradient is exact in
    float32 and not in 16 bits, and those of all heads cancel."""
    length, dim, generator = 40, 16, torch.Generator().manual_seed(5)
    inputs = make_inputs(1, length, heads=3, groups=1, documents=range(length), dtype=dtype)
    inputs |= {"initial_state": None, "D": None, "cos": None, "sin": None}
    inputs["dt"], inputs["dt_bias"] = (
        torch.full((1, length, 3), math.log(math.e - 1)),
        torch.zeros(3),
    )
    one, two = (torch.randint(-8, 9, (1, length, dim), generator=generator) for _ in range(2))
    x = torch.stack((one, two, -one - two), 2).to(dtype)
    d_y = torch.zeros(1, length, 3, dim, dtype=dtype)
    d_y[..., 3] = 1
    for together in (True, False):
        leaves = {name: inputs[name].clone().requires_grad_() for name in ("B", "C")}
        y = ssd(
            **(inputs | leaves | {"x": x if together else x * torch.tensor([1, 0, 0])[:, None]})
        )
        grads = torch.autograd.grad(y, list(leaves.values()), d_y)
        for gradient in grads:
            assert gradient.any() != together


@pytest.mark.parametrize("missing", ["D", "initial_state", "rotation", "everything"])
def test_optional_inputs_may_be_absent(missing, shape):
    inputs = make_inputs(2, 40, documents=[33])
    if missing in ("rotation", "everything"):
        inputs |= {"cos": None, "sin": None}
    inputs |= {name: None for name in ("D", "initial_state") if missing in (name, "everything")}
    given = {name: value for name, value in inputs.items() if value is not None}
    found = run(lambda **a: ssd(**({"cos": None, "sin": None} | a)), given)
    expected = run(lambda **a: ssd_naive(**({"cos": None, "sin": None} | a)), given)
    assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("border", range(1, 34))
def test_border_anywhere_in_a_chunk(border, shape):
    inputs = make_inputs(1, 34, heads=1, documents=[border])
    assert_close(run(ssd, inputs, 16), run(ssd_naive, inputs), TOLERANCE[torch.float32])


def test_documents_of_one_token(shape):
    inputs = make_inputs(2, 40, documents=range(40))
    assert_close(run(ssd, inputs), run(ssd_naive, inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "repeated", [1, 2, -1], ids=["inside a row", "at a row's start", "at the end"]
)
def test_empty_documents_change_no_bit(repeated, shape):
    """As `parallel.graphs` pads the boundaries."""
    inputs = make_inputs(2, 90, groups=2, documents=[37], dtype=torch.bfloat16)
    boundaries = inputs["cu_seqlens"].tolist()
    padded = torch.tensor(sorted([*boundaries, *[boundaries[repeated]] * 3]), dtype=torch.int32)
    expected, found = run(ssd, inputs), run(ssd, inputs | {"cu_seqlens": padded})
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_documents_do_not_leak(dtype, shape):
    """Changing the first document changes no bit of the second, forward or backward."""
    results = []
    for factor in (1.0, 7.3):
        inputs = make_inputs(1, 90, heads=2, documents=[37], dtype=dtype)
        for name in ("x", "dt", "B", "C"):
            inputs[name][:, :37] *= factor
        inputs["initial_state"] = inputs["initial_state"] * factor
        results.append(run(ssd, inputs, 16))
    for name in ("y", "d_x", "d_dt", "d_B", "d_C"):
        assert torch.equal(*(result[name][:, 37:] for result in results)), name
    assert torch.equal(*(result["final_state"] for result in results))


def test_two_runs_are_bitwise_equal(shape):
    inputs = make_inputs(2, 90, groups=2, documents=[37], dtype=torch.bfloat16)
    first, second = run(ssd, inputs), run(ssd, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("decay", "steps"), [(-0.01, -12.0), (-0.01, 3.0), (-50.0, -12.0), (-50.0, 3.0)]
)
def test_extreme_decays(decay, steps, shape):
    inputs = make_inputs(1, 70, documents=[33])
    inputs["A"] = torch.full_like(inputs["A"], decay)
    inputs["dt"] = inputs["dt"] + steps
    assert_close(run(ssd, inputs), run(ssd_naive, inputs), 1e-4)


def test_tiny_steps_are_their_exponential(shape):
    inputs = make_inputs(1, 40, heads=1, documents=[17])
    inputs |= {"D": None, "initial_state": None, "dt": inputs["dt"] / 10 - 40}
    found, expected = run(ssd, inputs), run(ssd_naive, inputs)
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-4, name


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_packing(shape, data):
    length = data.draw(st.integers(1, 60))
    documents = data.draw(st.sets(st.integers(0, length - 1), max_size=8))
    batch, chunk = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([16, 32, 64]))
    inputs = make_inputs(batch, length, heads=2, documents=documents)
    with pytest.MonkeyPatch.context() as patch:  # float32 tiles are of 16 tokens only
        patch.setattr(fused, "tile", lambda *_: tiles.Tile(chunk, 16, 8, 1, None))
        found = run(ssd, inputs)
    assert_close(found, run(ssd_naive, inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_longer_chunk_is_an_upper_bound(dtype):
    inputs = make_inputs(1, 150, heads=1, dtype=dtype)
    assert torch.equal(run(ssd, inputs, 256)["y"], run(ssd, inputs)["y"])


@pytest.mark.parametrize(
    "target",
    [Target("cuda", 80, 108), Target("cuda", 100, 148), Target("hip", "gfx942", 304)],
    ids=lambda target: str(target.arch),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("head_dim", "state_dim"), [(128, 64), (64, 128)])
def test_tiles_of_every_gpu(head_dim, state_dim, dtype, target, shape, monkeypatch):
    """Blocks of P, which sm_90 has in float32 alone."""
    choice = tiles.tile(target, dtype, head_dim, state_dim, 0)
    monkeypatch.setattr(fused, "tile", lambda *_: choice)
    inputs = make_inputs(1, 40, 2, head_dim, state_dim, dtype=dtype, documents=[21])
    assert_close(run(ssd, inputs), run(ssd_naive, inputs), TOLERANCE[dtype])


def test_tuning_tries_tiles_through_the_scan_itself(shape):
    inputs = make_tuned(1, 40, 2, 32, 16, torch.float32, torch.get_default_device())
    tried = [tiles.Tile(16, 32, 8, 1, None), tiles.Tile(32, 16, 8, 1, None)]
    chunks = []

    def trial(choice):
        with tiles.forced_tile(choice), pytest.MonkeyPatch.context() as patch:
            choose = fused.choose_shape
            patch.setattr(
                fused, "choose_shape", lambda *args: chunks.append(args[1].chunk) or choose(*args)
            )
            return -float(choice.chunk), run_scan(inputs, torch.ones_like(inputs["x"]))

    best, _ = fastest(tried, trial, TOLERANCE[torch.float32])
    assert best == tried[1]
    assert set(chunks) == {16, 32}


def chosen(target, *size, dtype=torch.bfloat16):
    problem = Problem(*size, dtype)
    choice = tiles.tile(target, dtype, problem.head_dim, problem.state_dim, 0)
    return [choose_shape(problem, choice, target, backward) for backward in (False, True)]


def test_shape_follows_the_size_of_the_gpu():
    h100, a100 = Target("cuda", 90, 132), Target("cuda", 80, 108)
    assert chosen(h100, 8, 4096, 16, 16, 128, 128) == [Shape("fused")] * 2
    assert chosen(h100, 1, 4096, 8, 8, 128, 128) == [Shape("split")] * 2
    assert chosen(a100, 8, 4096, 16, 16, 128, 128) == [Shape("fused"), Shape("split")]
    for cut in chosen(h100, 8, 4096, 12, 12, 64, 128):
        assert cut.kind == "segmented"
        assert (cut.segments - 1) * 8 * 12 >= 2 * 132  # of each launch
    assert [shape.kind for shape in chosen(h100, 8, 4096, 16, 4, 128, 128)] == ["fused", "split"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("A", torch.tensor([-1.0, float("nan")]), "A has values that are not negative"),
        ("A", torch.tensor([-1.0, 0.5]), "A has values that are not negative"),
        ("cu_seqlens", torch.tensor([0, 10, 39], dtype=torch.int32), "does not cut 1 rows of 40"),
        ("cu_seqlens", torch.tensor([0, 30, 20, 40], dtype=torch.int32), "does not cut"),
    ],
)
def test_strict_mode_reads_values(name, value, says):
    inputs = make_inputs(1, 40, heads=2) | {name: value}
    with pytest.raises(ValueError, match=says):
        ssd(**inputs)


@pytest.mark.parametrize(
    "size", [{"head_dim": 24}, {"head_dim": 8}, {"state_dim": 8}, {"state_dim": 256}], ids=str
)
def test_strict_mode_refuses_what_triton_cannot_serve(size):
    inputs = make_inputs(1, 8, **size)
    ((name, value),) = size.items()
    with pytest.raises(ValueError, match=rf"ssd: {name}={value} is not .* \(strict mode"):
        ssd(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "size", [(2, 37, 2, 16, 16, 2), (1, 70, 4, 16, 32, 2), (2, 1, 3, 32, 16, 1)], ids=str
)
def test_columns_of_one_buffer_are_read_where_they_lie(size, dtype, shape):
    """Bit for bit as contiguous ones, and gradients in one buffer."""
    *sizes, groups = size
    inputs = make_inputs(
        *sizes, groups=groups, dtype=dtype, documents=[20] if sizes[1] > 20 else ()
    )
    inputs["dt"] = inputs["dt"].to(dtype)
    names = ("x", "B", "C", "dt")
    together = side_by_side([inputs[name] for name in names], rest=5)
    results = []
    for these in (inputs, inputs | dict(zip(names, together, strict=True))):
        leaves = {name: these[name].detach().requires_grad_() for name in DIFFERENTIABLE}
        y, state = ssd(**(these | leaves), output_final_state=True)
        d_y, d_state = (
            torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype) for t in (y, state)
        )
        grads = torch.autograd.grad([y, state], list(leaves.values()), [d_y, d_state])
        results.append({"y": y, "state": state, **dict(zip(DIFFERENTIABLE, grads, strict=True))})
    contiguous, found = results
    for name, expected in contiguous.items():
        assert torch.equal(found[name], expected), name
    assert shared_stride([found[name] for name in names]) == shared_stride(together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "plain"])
def test_shared_tables_are_those_that_a_call_makes(dtype, rotated, shape):
    inputs = make_inputs(2, 40, documents=[33], dtype=dtype)
    if not rotated:
        inputs |= {"cos": None, "sin": None}
    tables = ("cu_seqlens", "cos", "sin")
    same = {name: inputs.pop(name) for name in tables}  # these very tensors, in both calls
    rope = (same["cos"], same["sin"]) if rotated else None
    shared = scan_tables(same["cu_seqlens"], rope, 80, dtype)
    found = run(lambda **a: ssd(**a, **same, tables=shared), inputs)
    expected = run(lambda **a: ssd(**a, **same), inputs)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
