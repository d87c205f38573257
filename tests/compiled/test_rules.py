"""The audit's rules, on kernels that break them and on one that breaks none."""

from collections.abc import Callable

import pytest
import torch

from kernels.audit.compiling import TARGETS
from kernels.audit.rules import Allowance, Violation, faults, judge
from tests.compiled.test_resources import compiled
from tests.compiled.toys import (
    META,
    blocked_product,
    converted_product,
    copied,
    product,
    scan,
    summed,
)


def broken(target: str, launch: Callable[[], object]) -> dict[str, str]:
    return dict(faults(TARGETS[target], compiled(target, launch)))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_sound_kernels_break_no_rule(target: str) -> None:
    assert broken(target, lambda: scan(64, 64, 64, stages=1)) == {}
    assert broken(target, lambda: copied(torch.empty(4096, device=META))) == {}


def test_the_public_bug_is_caught() -> None:
    """mamba_ssm's issue 904 on GB200: two warps, 32 registers, tens of kB spilled."""
    found = compiled("sm_100", lambda: scan(64, 128, 128, stages=1, num_warps=2))
    assert found.registers == 32
    assert found.spill_stores > 10_000
    rules = dict(faults(TARGETS["sm_100"], found))
    assert {"spill", "capped registers"} <= rules.keys()
    assert f"spills {found.spill_stores:,} bytes a thread" in rules["spill"]
    assert "has 32 registers" in rules["capped registers"]


def test_a_bf16_product_off_the_tensor_cores_is_refused() -> None:
    rules = broken("gfx942", lambda: product(8, 8, 16, torch.bfloat16))
    assert rules == {"tensor cores": "product 8x8x16 of bf16 at toys.py:19 runs on fma"}
    assert broken("gfx942", lambda: product(8, 8, 16, torch.float32)) == {}


def test_a_converted_product_of_bf16_tensors_is_refused() -> None:
    """Operands loaded as bf16 and multiplied as float32 run on FMA just as well."""
    rules = broken("sm_90", lambda: converted_product(torch.bfloat16))
    assert "16x16x16 of f32" in rules["tensor cores"]


@pytest.mark.parametrize(("target", "limit"), [("sm_80", "166,912"), ("sm_90", "232,448")])
def test_too_much_shared_memory_is_refused(target: str, limit: str) -> None:
    rules = broken(target, lambda: blocked_product(128, 256, 64, num_stages=5, num_warps=8))
    assert rules.keys() == {"shared memory"}
    assert rules["shared memory"].endswith(f"bytes of shared memory; a program has {limit}")


def test_too_few_warps_are_refused() -> None:
    rules = broken("sm_90", lambda: blocked_product(128, 128, 32, num_stages=8, num_warps=4))
    assert rules == {
        "occupancy": "keeps 4 warps on a multiprocessor, limited by shared; 8 are wanted"
    }


@pytest.mark.parametrize(("target", "refused"), [("sm_90", False), ("sm_100", True)])
def test_recurrent_kernels_take_one_stage_on_blackwell(target: str, refused: bool) -> None:
    rules = broken(target, lambda: scan(32, 32, 32, stages=2))
    assert ("stages" in rules) == refused
    assert broken(target, lambda: blocked_product(64, 64, 64, num_stages=2)) == {}


def test_atomics_are_refused() -> None:
    rules = broken("sm_80", lambda: summed(torch.empty(1024, device=META)))
    assert rules.keys() == {"atomics"}


SPILL = Violation("ssd bf16", "scan_kernel", "sm_80", "spill", "spills")
ATOMICS = Violation("ssd bf16", "scan_kernel", "sm_80", "atomics", "has atomics")
AUDITED = [("ssd bf16", "scan_kernel", "sm_80"), ("ssd bf16", "scan_kernel", "sm_90")]


def test_an_allowance_accepts_only_what_it_names() -> None:
    allowance = Allowance("ssd*", "scan_kernel", "sm_80", "spill", "no better tile is known")
    verdict = judge([SPILL, ATOMICS], AUDITED, [allowance])
    assert verdict.refused == [ATOMICS]
    assert verdict.accepted == [(SPILL, allowance)]
    assert verdict.stale == []


def test_an_allowance_for_what_is_mended_is_stale() -> None:
    mended = Allowance("ssd*", "scan_kernel", "sm_90", "spill", "was needed once")
    elsewhere = Allowance("ssd*", "scan_kernel", "gfx942", "spill", "this target was not audited")
    verdict = judge([SPILL], AUDITED, [mended, elsewhere])
    assert verdict.refused == [SPILL]
    assert verdict.stale == [mended]
