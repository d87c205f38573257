"""Offsets that grow with a tensor are 64-bit: int32 arithmetic overflows here at a few hundred.

A tensor of 2^31 elements is too large for a test. So the bound of the interpreter's int32 is set
below the sizes of all tensors, and above what a program's own tile needs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernels.audit.builder import Builder
from kernels.cross_entropy import fused as fused_loss
from kernels.norm import fused as fused_norm
from kernels.ssd import fused as fused_scan
from kernels.ssd.naive import ssd_naive
from kernels.ssd.shapes import Shape, segmented
from kernels.ssd.ssd import ssd
from kernels.swiglu import fused as fused_product
from kernels.swiglu.naive import swiglu_naive
from kernels.swiglu.swiglu import swiglu
from tests.kernels.cross_entropy_cases import assert_no_worse_than_megatron, run_split
from tests.kernels.cross_entropy_cases import inputs as loss_inputs
from tests.kernels.cross_entropy_cases import run as run_loss
from tests.kernels.norm_cases import OPERATIONS
from tests.kernels.norm_cases import inputs as norm_inputs
from tests.kernels.operation_cases import assert_matches
from tests.kernels.scan_cases import assert_close, make_inputs, run
from tests.kernels.step_cases import assert_step_matches, step_inputs
from tests.kernels.test_rope import queries_and_keys, rotations
from tests.kernels.test_swiglu import inputs as product_inputs


@pytest.fixture
def bound_int32(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call with the first number that int32 is not to hold."""

    def install(bound: int) -> None:
        def checked(self: Any, lhs: Any, rhs: Any, op: np.ufunc) -> Any:
            result = self.binary_op(lhs, rhs, op)
            if result.data.dtype == np.int32 and (abs(result.data.astype(np.int64)) >= bound).any():
                raise OverflowError(f"{abs(result.data).max()} in int32, of {bound} at most")
            return result

        monkeypatch.setattr(Builder, "_int_op", checked)

    return install


@pytest.mark.parametrize(
    "shape", [Shape("fused"), segmented(10, 4, 1), Shape("split")], ids=lambda shape: shape.kind
)
def test_scan(
    shape: Shape, bound_int32: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are 16 tokens of 4 heads of 16: 1,024 elements; states 2 · 4 · 10 · 256."""
    monkeypatch.setattr(fused_scan, "choose_shape", lambda *_: shape)
    inputs = make_inputs(2, 150, documents=[70])
    bound_int32(1100)
    assert_close(run(ssd, inputs, 16), run(ssd_naive, inputs), 5e-6)


def test_passing_states_on_does_not_depend_on_chunks_in_int32(
    bound_int32: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one head has few elements and many chunks."""
    monkeypatch.setattr(fused_scan, "choose_shape", lambda *_: Shape("split"))
    inputs = make_inputs(1, 300, heads=1, documents=[70]) | {"D": None}
    bound_int32(600)
    assert_close(run(ssd, inputs, 16), run(ssd_naive, inputs), 5e-6)


def test_step(bound_int32: Callable[[int], None]) -> None:
    inputs = step_inputs(60, 4, 2, 16, 16)
    bound_int32(230)
    assert_step_matches(inputs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_norm(
    name: str, bound_int32: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in ("forward_programs", "backward_programs"):
        monkeypatch.setattr(fused_norm, function, lambda *_: 3)
    bound_int32(500)
    assert_matches(*OPERATIONS[name][:2], norm_inputs(name, (83, 90)))


def test_rope(bound_int32: Callable[[int], None]) -> None:
    bound_int32(350)
    assert_matches(*rotations(2, 200, 32), queries_and_keys(2, 200, 4, 2, 32))
    # heads apart by more than the bound
    far = [
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in queries_and_keys(1, 20, 4, 2, 32)
    ]
    assert_matches(*rotations(1, 20, 32), far)


def test_swiglu(bound_int32: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_product, "BLOCK", 64)
    bound_int32(100)
    assert_matches(swiglu, swiglu_naive, product_inputs(7, 40))


def test_cross_entropy(bound_int32: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has 300 columns, in blocks of 64; 30 rows have 9,000."""
    monkeypatch.setattr(fused_loss, "BLOCK", 64)
    given = loss_inputs(300, 257, rows=30)
    bound_int32(700)
    assert_no_worse_than_megatron(run_loss(*given, 257), *given, 257)
    assert_no_worse_than_megatron(run_split(fused_loss, 4, *given, 257), *given, 257)
