"""What one call of an operation launches and moves, counted, against the kernels' formulas."""

import pytest
import torch

from kernels.audit.traffic import count_traffic
from kernels.cross_entropy import fused as cross_entropy
from kernels.norm import fused as norm
from kernels.rope import fused as rope
from kernels.ssd import fused_step
from kernels.ssd.step import ssd_step
from kernels.swiglu import fused as product
from kernels.swiglu.swiglu import swiglu
from kernels.target import INTERPRETED
from tests.kernels.cross_entropy_cases import inputs as cross_entropy_inputs
from tests.kernels.cross_entropy_cases import run as run_cross_entropy
from tests.kernels.cross_entropy_cases import run_split
from tests.kernels.norm_cases import OPERATIONS
from tests.kernels.norm_cases import inputs as norm_inputs
from tests.kernels.operation_cases import assert_repeatable, outputs_and_gradients
from tests.kernels.step_cases import step_inputs
from tests.kernels.test_rope import queries_and_keys, rotations
from tests.kernels.test_swiglu import inputs as swiglu_inputs


@pytest.mark.parametrize("size", [(2, 37, 4, 1, 64), (1, 3, 5, 3, 12)], ids=str)
def test_a_rotation_is_one_launch_each_way(size):
    batch, length, q_heads, k_heads, dim = size
    with count_traffic() as traffic:
        assert_repeatable(rotations(batch, length, dim)[0], queries_and_keys(*size))
    (kernel,) = traffic.values()
    loaded, stored = rope.traffic(batch * length, q_heads + k_heads, dim, 4, INTERPRETED.num_sms)
    assert kernel.launches == 4  # two runs, forward and backward
    assert (kernel.loaded, kernel.stored) == (4 * loaded, 4 * stored)


@pytest.mark.parametrize("name", ["branch", "residual", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_is_one_launch_each_way_and_one_for_weights(name, dtype):
    rows, channels = 700, 17
    with count_traffic() as traffic:
        outputs_and_gradients(OPERATIONS[name][0], norm_inputs(name, (rows, channels), dtype))
    what = {"add": name != "branch", "norm": name != "residual"}
    size = (rows, channels, dtype.itemsize, INTERPRETED.num_sms)
    forward, backward, weights = (
        traffic[f"{part}_kernel"] for part in ("norm_forward", "norm_backward", "weight_gradient")
    )
    assert forward.launches == backward.launches == weights.launches == 1
    assert (forward.loaded, forward.stored) == norm.forward_traffic(*size, **what)
    moved = backward.loaded + weights.loaded, backward.stored + weights.stored
    assert moved == norm.backward_traffic(*size, **what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_swiglu_product_is_one_launch_each_way(dtype):
    with count_traffic() as traffic:
        outputs_and_gradients(swiglu, swiglu_inputs(3, 999, dtype=dtype))
    forward, backward = traffic["swiglu_forward_kernel"], traffic["swiglu_backward_kernel"]
    assert forward.launches == backward.launches == 1
    assert (forward.loaded, forward.stored) == product.forward_traffic(2997, dtype.itemsize)
    assert (backward.loaded, backward.stored) == product.backward_traffic(2997, dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cross_entropy_is_one_launch_and_two_over_ranks(dtype):
    given = cross_entropy_inputs(300, 257, dtype)
    with count_traffic() as traffic:
        run_cross_entropy(*given, 257)
    (kernel,) = traffic.values()
    assert kernel.launches == 1
    assert (kernel.loaded, kernel.stored) == cross_entropy.traffic(9, 300, dtype.itemsize, 1)
    with count_traffic() as traffic:
        run_split(cross_entropy, 3, *given, 257)
    statistics, finish = traffic["statistics_kernel"], traffic["cross_entropy_kernel"]
    assert statistics.launches == finish.launches == 3
    loaded, stored = cross_entropy.traffic(9, 100, dtype.itemsize, 3)
    assert statistics.loaded + finish.loaded == 3 * loaded
    assert statistics.stored + finish.stored == 3 * stored


@pytest.mark.parametrize("size", [(2, 4, 2, 16, 8), (1, 3, 1, 128, 128)], ids=str)
def test_a_step_of_the_scan_is_one_launch(size):
    batch, heads, _, head_dim, state_dim = size
    inputs = step_inputs(*size, torch.bfloat16)
    inputs |= {"dt": inputs["dt"].bfloat16(), "D": None}
    with count_traffic() as traffic:
        ssd_step(**inputs)
    kernel = traffic["ssd_step_kernel"]
    assert kernel.launches == 1
    assert (kernel.loaded, kernel.stored) == fused_step.traffic(
        batch, heads, head_dim, state_dim, 2, 4
    )
