"""The chunked scan against the float64 recurrence: outputs, final state and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.slices import shared_stride
from kernels.ssd.blocks import blocks, chunks_at_once, heads_at_once
from kernels.ssd.naive import ssd_naive
from kernels.ssd.ssd import ssd, ssd_from_log
from kernels.ssd.step import ssd_step
from kernels.ssd.tables import scan_tables
from tests.kernels.operation_cases import side_by_side
from tests.kernels.scan_cases import assert_close, make_inputs, relative_error, run

FLOAT32, BFLOAT16 = 5e-6, 1e-2


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("choice", ["torch", "naive"])
def test_logarithms_of_decays_are_decays(choice, monkeypatch):
    """Outputs, final state and the logarithms' gradient, bit for bit in torch."""
    monkeypatch.setenv("TRANSXSSM_KERNELS", choice)
    inputs = make_inputs(2, 40, documents=[33])
    rest = {name: value for name, value in inputs.items() if name not in ("x", "dt", "A", "B", "C")}
    x, dt, B, C = (inputs[name] for name in ("x", "dt", "B", "C"))
    A_log = inputs["A"].neg().log().requires_grad_()
    plain = ssd(x, dt, -A_log.exp(), B, C, output_final_state=True, **rest)
    found = ssd_from_log(x, dt, A_log, B, C, **rest)
    tolerance = 0 if choice == "torch" else 1e-6  # the oracle takes exponentials in float64
    for left, right in zip(plain, found, strict=True):
        assert relative_error(left, right) <= tolerance
    grads = [torch.autograd.grad(y.square().sum(), A_log)[0] for y, _ in (plain, found)]
    assert relative_error(*grads) <= tolerance


def test_logarithms_of_another_dtype_are_refused_by_name():
    inputs = make_inputs(1, 8)
    x, dt, A, B, C = (inputs.pop(name) for name in ("x", "dt", "A", "B", "C"))
    with pytest.raises(TypeError, match="A_log has dtype"):
        ssd_from_log(x, dt, A.double(), B, C, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 2, 16, 8), (2, 63, 2, 8, 16), (1, 64, 4, 16, 16), (2, 65, 2, 16, 32),
     (1, 200, 4, 32, 64), (1, 1000, 4, 64, 128)],
    ids=lambda shape: "B{}-L{}-H{}-P{}-N{}".format(*shape),
)  # fmt: skip
def test_matches_recurrence(shape, dtype):
    length = shape[1]
    inputs = make_inputs(
        *shape, dtype=dtype,
        documents=[d for d in (1, 5, 64, 130) if d < length],
    )  # fmt: skip
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
    assert_close(run(ssd, inputs), run(ssd_naive, inputs), tolerance)


@pytest.mark.parametrize("missing", ["D", "initial_state", "rotation", "everything"])
def test_optional_inputs_may_be_absent(missing):
    inputs = make_inputs(2, 70, documents=[33])
    if missing in ("rotation", "everything"):
        inputs |= {"cos": None, "sin": None}
    inputs |= {name: None for name in ("D", "initial_state") if missing in (name, "everything")}
    without = {name: value for name, value in inputs.items() if value is not None}
    found = run(lambda **a: ssd(**({"cos": None, "sin": None} | a)), without, 32)
    assert_close(
        found, run(lambda **a: ssd_naive(**({"cos": None, "sin": None} | a)), without), 5e-6
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 128])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_and_chunk_sizes(groups, chunk_size):
    inputs = make_inputs(2, 50, groups=groups, documents=[7, 8, 31])
    assert_close(run(ssd, inputs, chunk_size), run(ssd_naive, inputs), FLOAT32)


def test_groups_in_bf16():
    inputs = make_inputs(2, 50, groups=2, dtype=torch.bfloat16, documents=[7])
    assert_close(run(ssd, inputs, 16), run(ssd_naive, inputs), BFLOAT16)


def test_documents_of_one_token():
    inputs = make_inputs(2, 40, documents=range(40))
    assert_close(run(ssd, inputs, 16), run(ssd_naive, inputs), FLOAT32)


@pytest.mark.parametrize("border", [1, 15, 16, 17, 31, 32, 47, 48, 49])
def test_border_anywhere_in_a_chunk(border):
    inputs = make_inputs(1, 50, heads=2, documents=[border])
    assert_close(run(ssd, inputs, 16), run(ssd_naive, inputs), FLOAT32)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_packing(data):
    length = data.draw(st.integers(1, 60))
    documents = data.draw(st.sets(st.integers(0, length - 1), max_size=8))
    batch, chunk = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([4, 16, 64]))
    inputs = make_inputs(batch, length, heads=2, head_dim=8, state_dim=4, documents=documents)
    assert_close(run(ssd, inputs, chunk), run(ssd_naive, inputs), FLOAT32)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_decay_gradient_survives_cancellation(chunk_size):
    """Here d_A_log is a twentieth of its terms, yet moving the inputs by half their last bit moves
    it by 3e-6 at most."""
    inputs = make_inputs(3, 33, heads=2, head_dim=8, state_dim=4, documents=[4, 13])
    found, expected = run(ssd, inputs, chunk_size), run(ssd_naive, inputs)
    assert relative_error(found["d_A_log"], expected["d_A_log"]) <= FLOAT32


def test_several_blocks_match_one(monkeypatch):
    inputs = make_inputs(2, 150, documents=[40])
    whole = run(ssd, inputs, 16)
    monkeypatch.setattr("kernels.ssd.blocks._BLOCK_BYTES", 3 * 4 * 4 * 16 * 16)
    heads = heads_at_once(inputs["x"], 16, 4, 16)
    assert heads == 4
    most = chunks_at_once(inputs["x"], 16, 16, heads)
    found = [(b.chunks.start, b.count, b.size) for b in blocks(150, 16, most)]
    assert found == [(0, 3, 16), (3, 3, 16), (6, 3, 16), (9, 1, 6)]
    assert_close(run(ssd, inputs, 16), whole, 1e-6)


@pytest.mark.parametrize(("groups", "together"), [(4, 2), (4, 1), (2, 2)])
def test_several_parts_of_a_row_match_one(groups, together, monkeypatch):
    """Heads that are not walked together."""
    inputs = make_inputs(2, 50, groups=groups, documents=[40])
    whole = run(ssd, inputs, 16)
    monkeypatch.setattr("kernels.ssd.blocks._BLOCK_BYTES", together * 4 * 16 * 16)
    assert heads_at_once(inputs["x"], 16, groups, 16) == together
    assert_close(run(ssd, inputs, 16), whole, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dt_bias", [-1, 2], ids=["dt-0.5", "dt-3"])
@pytest.mark.parametrize("A", [-0.01, -1.0, -50.0])
def test_slow_and_fast_decay(A, dt_bias, dtype):
    inputs = make_inputs(1, 150, heads=2, A=[A, A], documents=[77], dtype=dtype)
    inputs["dt_bias"] = torch.full((2,), float(dt_bias))  # -50 forgets within a token
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
    assert_close(run(ssd, inputs), run(ssd_naive, inputs), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shift", [-200.0, 60.0, 1e4])
def test_extreme_steps_stay_finite(shift, dtype):
    inputs = make_inputs(1, 70, heads=2, dtype=dtype, documents=[30])
    inputs["dt_bias"] = inputs["dt_bias"] + shift
    for name, value in run(ssd, inputs).items():
        assert value.isfinite().all(), name


def test_tiny_steps_are_their_exponential():
    """A softplus below float32's resolution is exp, and so small is what is written."""
    inputs = make_inputs(1, 40, heads=2, documents=[17])
    inputs |= {"D": None, "initial_state": None, "dt": inputs["dt"] / 10 - 40}
    found, expected = run(ssd, inputs, 16), run(ssd_naive, inputs)
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 10 * FLOAT32, name


def test_gradcheck_float64():
    shape = {"heads": 2, "head_dim": 2, "state_dim": 4, "groups": 1, "documents": [2]}
    inputs = make_inputs(1, 7, dtype=torch.float64, exact=torch.float64, **shape)
    names = ("x", "dt", "A", "B", "C", "dt_bias", "D", "initial_state")

    def function(*values):
        given = inputs | dict(zip(names, values, strict=True))
        return ssd(**given, chunk_size=4, output_final_state=True)

    torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("used", ["y", "final_state"])
def test_gradient_through_one_output_alone(used):
    inputs = make_inputs(2, 40, documents=[9])
    grads = []
    for scan in (ssd, ssd_naive):
        x = inputs["x"].clone().requires_grad_()
        y, state = scan(**(inputs | {"x": x}), output_final_state=True)
        (y if used == "y" else state).sum().backward()
        grads.append(x.grad)
    assert relative_error(*grads) <= FLOAT32


@pytest.mark.parametrize("split", [16, 37])
def test_split_and_continue_equals_whole(split):
    inputs = make_inputs(2, 90, documents=[])

    def in_two(cu_seqlens, initial_state, **whole):
        pieces, state = [], initial_state
        for start, stop in ((0, split), (split, 90)):
            part = {
                n: v[:, start:stop].contiguous() if n in ("x", "dt", "B", "C", "cos", "sin") else v
                for n, v in whole.items()
            }
            y, state = ssd(
                **part, cu_seqlens=torch.tensor([0, 1, 2]) * (stop - start), initial_state=state
            )
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    assert_close(run(in_two, inputs, 16), run(ssd, inputs, 16), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("border", [1, 20, 64, 100])
def test_documents_ignore_each_other_bitwise(border, dtype):
    inputs = make_inputs(1, 150, dtype=dtype, documents=[border])
    reference = run(ssd, inputs)
    for kept, changed in ((slice(border, None), slice(0, border)),
                          (slice(0, border), slice(border, None))):  # fmt: skip
        other = dict(inputs)
        for name in ("x", "dt", "B", "C"):
            other[name] = inputs[name].clone()
            other[name][:, changed] *= 3.7
        found = run(ssd, other)
        for name in ("y", "d_x", "d_dt", "d_B", "d_C"):
            assert torch.equal(found[name][:, kept], reference[name][:, kept]), name
            assert not torch.equal(found[name], reference[name]), name


def test_two_runs_are_bitwise_equal():
    inputs = make_inputs(2, 150, documents=[20])
    first, second = run(ssd, inputs), run(ssd, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiled_whole_it_is_the_same():
    with torch.device("cpu"):  # Dynamo does not trace launches of Triton's kernels
        inputs = make_inputs(1, 100, heads=2, documents=[37])
        found = run(torch.compile(ssd, fullgraph=True), inputs, 16)
        expected = run(ssd, inputs, 16)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_packed_equals_alone():
    inputs = make_inputs(1, 150, documents=[61]) | {"initial_state": None}
    packed = ssd(**inputs)
    for start, stop in ((0, 61), (61, 150)):
        alone = {
            n: v[:, start:stop].contiguous() if n in ("x", "dt", "B", "C", "cos", "sin") else v
            for n, v in inputs.items()
        } | {"cu_seqlens": torch.tensor([0, stop - start])}
        assert relative_error(packed[:, start:stop], ssd(**alone)) <= 1e-5


@pytest.mark.parametrize("groups", [1, 4])
def test_steps_equal_scan(groups):
    inputs = make_inputs(2, 40, groups=groups)
    y, final_state = ssd(**inputs, output_final_state=True)
    state, outputs = inputs["initial_state"], []
    fixed = {name: inputs[name] for name in ("A", "dt_bias", "D")}
    for t in range(40):
        token = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C", "cos", "sin")}
        out, state = ssd_step(state, **token, **fixed)
        outputs.append(out)
    assert relative_error(torch.stack(outputs, dim=1), y) <= FLOAT32
    assert relative_error(state, final_state) <= FLOAT32


def test_strides_that_are_no_rows_are_named():
    inputs = make_inputs(2, 40)
    for name in ("x", "dt", "B", "C", "cos"):
        view = torch.cat((inputs[name], inputs[name]), dim=-1)[..., : inputs[name].shape[-1]]
        if name == "dt":  # a slice of rows
            view = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        with pytest.raises(ValueError, match=rf"{name} .*strides .*pass {name}.contiguous"):
            ssd(**(inputs | {name: view}))


@pytest.mark.parametrize(
    ("name", "bad", "error", "says"),
    [
        (
            "x",
            torch.zeros(2, 8, 4),
            ValueError,
            r"x has shape \(2, 8, 4\); expected \[B, L, H, P\]",
        ),
        ("x", torch.zeros(2, 8, 4, 16, dtype=torch.int32), TypeError, "x has dtype torch.int32"),
        ("dt", torch.zeros(2, 9, 4), ValueError, r"dt has shape \(2, 9, 4\); expected \(2, 8, 4\)"),
        ("dt", torch.zeros(2, 8, 4).double(), TypeError, "dt has dtype torch.float64; expected"),
        ("A", torch.zeros(3), ValueError, r"A has shape \(3,\); expected \(4,\)"),
        ("A", torch.zeros(4).bfloat16(), TypeError, "A has dtype torch.bfloat16"),
        ("B", torch.zeros(2, 8, 3, 16), ValueError, "B has shape .* with G dividing 4 heads"),
        ("B", torch.zeros(2, 8, 4, 16).half(), TypeError, "B has dtype torch.float16"),
        ("C", torch.zeros(2, 8, 2, 16), ValueError, "C has shape"),
        ("cos", torch.zeros(2, 8, 16), ValueError, r"cos has shape .* expected \(2, 8, 8\)"),
        ("sin", None, ValueError, "sin is None; pass both cos and sin or none"),
        ("dt_bias", torch.zeros(1), ValueError, "dt_bias has shape"),
        ("initial_state", torch.zeros(2, 4, 16, 8), ValueError, "initial_state has shape"),
        ("D", torch.zeros(5), ValueError, "D has shape"),
        ("D", torch.zeros(4, device="meta"), ValueError, "D is on meta; expected c"),
        ("cu_seqlens", torch.tensor([0, 16]), ValueError, "cu_seqlens has shape .* each of 2 rows"),
        ("cu_seqlens", torch.tensor([0.0, 8, 16]), TypeError, "cu_seqlens has dtype torch.float32"),
        ("chunk_size", 48, ValueError, "chunk_size=48; expected a power of two"),
        ("chunk_size", -2, ValueError, "chunk_size=-2"),
    ],
)
def test_bad_input_is_named(name, bad, error, says):
    with pytest.raises(error, match=says):
        ssd(**(make_inputs(2, 8) | {name: bad}))


def test_step_names_bad_state():
    with pytest.raises(ValueError, match="state has shape"):
        ssd_step(
            torch.zeros(2, 4, 16, 8), torch.zeros(2, 4, 16), torch.zeros(2, 4), torch.zeros(4),
            torch.zeros(2, 4, 16), torch.zeros(2, 4, 16), cos=None, sin=None,
            dt_bias=torch.zeros(4),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("groups", [1, 4])
def test_columns_of_one_buffer(groups, dtype):
    """Bit for bit as contiguous ones, and gradients in one buffer."""
    inputs = make_inputs(2, 70, groups=groups, dtype=dtype, documents=[20])
    inputs["dt"] = inputs["dt"].to(dtype)
    names = ("x", "B", "C", "dt")
    together = side_by_side([inputs[name] for name in names], rest=5)
    results = []
    for these in (inputs, inputs | dict(zip(names, together, strict=True))):
        leaves = [these[name].detach().requires_grad_() for name in names]
        y = ssd(**(these | dict(zip(names, leaves, strict=True))))
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    contiguous, found = results
    assert all(torch.equal(a, b) for a, b in zip(found, contiguous, strict=True))
    assert shared_stride(found[1:]) == together[0].stride(1)


@pytest.mark.parametrize("name", ["cu_seqlens", "cos", "sin"])
def test_tables_of_other_tensors_are_refused(name):
    """Equal ones would do, but to compare them would wait for the device."""
    inputs = make_inputs(2, 8)
    rope = inputs["cos"], inputs["sin"]
    tables = scan_tables(inputs["cu_seqlens"], rope, 16, torch.float32)
    ssd(**inputs, tables=tables)
    with pytest.raises(ValueError, match="tables were made of another cu_seqlens, cos or sin"):
        ssd(**(inputs | {name: inputs[name].clone()}), tables=tables)


def test_tables_for_another_batch_or_dtype_are_refused():
    inputs = make_inputs(2, 8)
    rope = inputs["cos"], inputs["sin"]
    with pytest.raises(ValueError, match=r"tables.documents has shape \(15,\); expected \(16,\)"):
        ssd(**inputs, tables=scan_tables(inputs["cu_seqlens"], rope, 15, torch.float32))
    with pytest.raises(TypeError, match=r"tables\.rotation has dtype torch\.float16"):
        ssd(**inputs, tables=scan_tables(inputs["cu_seqlens"], rope, 16, torch.bfloat16))
