"""What is read from compiled code, on kernels whose properties are known."""

from collections.abc import Callable

import pytest
import torch

from kernels.audit.compiling import TARGETS, compile_only
from kernels.audit.resources import Resources, occupancy, resources
from tests.compiled.toys import META, blocked_product, copied, product, scan, summed


def compiled(target: str, launch: Callable[[], object]) -> Resources:
    with compile_only(TARGETS[target]) as launches:
        launch()
    (only,) = launches
    return resources(only, TARGETS[target])


@pytest.mark.parametrize(
    ("target", "unit"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"),
                         ("gfx942", "mfma")]
)  # fmt: skip
def test_products_are_traced_to_their_unit(target: str, unit: str) -> None:
    found = compiled(target, lambda: scan(64, 64, 64, stages=1))
    assert [(p.shape, p.dtype, p.unit) for p in found.products] == [("64x64x64", "bf16", unit)] * 4
    assert found.products[2].line == found.products[3].line != found.products[1].line
    assert found.tensor_instructions > 0
    assert found.half


def test_a_product_that_falls_off_the_tensor_cores_keeps_its_dtype() -> None:
    found = compiled("gfx942", lambda: product(8, 8, 16, torch.bfloat16))
    assert [(p.shape, p.dtype, p.unit) for p in found.products] == [("8x8x16", "bf16", "fma")]
    assert found.tensor_instructions == 0


def test_ieee_float32_products_run_on_fma() -> None:
    found = compiled("sm_90", lambda: product(16, 32, 16, torch.float32))
    assert [(p.shape, p.dtype, p.unit) for p in found.products] == [("16x32x16", "f32", "fma")]
    assert not found.half


@pytest.mark.parametrize("stages", [1, 2])
def test_stages_count_where_a_matrix_is_carried_between_products(stages: int) -> None:
    assert compiled("sm_100", lambda: scan(32, 32, 32, stages)).recurrent_stages == stages


def test_an_accumulator_alone_is_not_recurrent() -> None:
    found = compiled("sm_90", lambda: blocked_product(64, 64, 64, num_stages=3))
    assert (found.num_stages, found.recurrent_stages) == (3, 0)
    assert found.async_copies == {128: found.async_copies[128]}
    assert found.shared >= 3 * 2 * 64 * 64 * 2


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize(("dtype", "aligned", "bits"), [
    (torch.float32, True, 128), (torch.bfloat16, True, 128), (torch.float32, False, 32),
    (torch.bfloat16, False, 16),
])  # fmt: skip
def test_widths_of_global_accesses(
    target: str, dtype: torch.dtype, aligned: bool, bits: int
) -> None:
    size = 4096 if aligned else 4097  # Triton vectorises a mask it knows to be a multiple of 16
    found = compiled(target, lambda: copied(torch.empty(size, dtype=dtype, device=META)))
    assert set(found.loads) == set(found.stores) == {bits}
    assert found.atomics == found.bulk_copies == found.local_instructions == 0
    assert 100 < found.code_bytes < 10_000


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_atomics_are_counted(target: str) -> None:
    found = compiled(target, lambda: summed(torch.empty(1024, device=META)))
    assert found.atomics == 1


def test_spills_agree_with_local_memory_instructions() -> None:
    found = compiled("sm_90", lambda: scan(64, 64, 64, stages=1, num_warps=2))
    assert found.registers == 255
    assert 0 < found.spill_stores < 1000
    # a spilled access moves 4 to 16 bytes
    spilled = found.spill_stores + found.spill_loads
    assert spilled / 16 <= found.local_instructions <= spilled / 4


@pytest.mark.parametrize(
    ("arch", "registers", "num_warps", "shared", "columns", "programs", "limiter"),
    [
        (90, 255, 4, 1024, 0, 2, "registers"),  # 65536 / (256 * 32 * 4)
        (90, 249, 8, 148_480, 0, 1, "registers"),
        (90, 166, 4, 115_456, 0, 2, "shared"),
        (80, 20, 4, 0, 0, 16, "warps"),
        (80, 32, 1, 0, 0, 32, "programs"),
        (90, 64, 4, 232_448, 0, 1, "shared"),
        (90, 64, 4, 232_449, 0, 0, "shared"),
        (100, 64, 4, 1024, 256, 2, "tensor memory"),
        ("gfx942", 512, 4, 0, 0, 1, "registers"),
        ("gfx942", 128, 4, 0, 0, 4, "registers"),
        ("gfx942", 64, 4, 20_480, 0, 3, "shared"),
    ],
)
def test_occupancy(
    arch: int | str, registers: int, num_warps: int, shared: int, columns: int, programs: int,
    limiter: str,
) -> None:  # fmt: skip
    assert occupancy(arch, registers, num_warps, shared, columns) == (programs, limiter)
