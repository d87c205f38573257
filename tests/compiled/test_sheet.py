"""The sheet of the audit: jobs, counted traffic, golden numbers, the command."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kernels.audit import command, document, golden, sheet
from kernels.audit.cases import Case, cases, find
from kernels.audit.compiling import TARGETS
from kernels.audit.problems import Problem
from kernels.audit.roofline import PEAKS, Traffic, Work, bound_seconds
from kernels.audit.rules import traffic_faults
from kernels.audit.sheet import Compiled, Count, Sheet, compile_case, disagreements
from pretrain.cli import app
from tests.compiled.toys import META, blocked_product, copied, product

WORK = Work(Traffic(100, 20), minimum=60, flops=0, allowed=2.0)
ROPE = "rope B8 L4096 H16+4 D64 bf16"


def compile_toy(monkeypatch: pytest.MonkeyPatch, *launches: object) -> Compiled:
    """A case that runs a callable for each of its passes."""

    def run(device: torch.device) -> Iterator[str]:
        for direction, launch in zip(("forward", "backward"), launches, strict=True):
            launch()  # type: ignore[operator]
            yield direction

    problem = Problem(run, lambda target: {"forward": WORK, "backward": WORK})
    monkeypatch.setattr(sheet, "find", lambda name: Case(name, problem, problem))
    return compile_case("toy", "sm_90")


def test_rows_tell_apart_passes_and_specialisations(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward() -> None:
        for size in (4096, 4096, 4097):
            copied(torch.empty(size, device=META))

    compiled = compile_toy(monkeypatch, forward, lambda: product(16, 16, 16, torch.bfloat16))
    assert [(r.direction, r.kernel, r.programs, r.launches) for r in compiled.rows] == [
        ("forward", "copy_kernel", 2, 2),
        ("forward", "copy_kernel#2", 3, 1),
        ("backward", "product_kernel", 1, 1),
    ]
    assert compiled.violations == []


def test_what_does_not_compile_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    too_small = compile_toy(
        monkeypatch, lambda: blocked_product(64, 64, 24), lambda: None
    ).violations  # a block must be a power of two
    assert [(v.kernel, v.rule) for v in too_small] == [
        ("toy", "compiles"), ("forward", "compiles"), ("backward", "compiles"),
    ]  # fmt: skip
    assert "CompilationError" in too_small[0].sentence


def test_a_pass_that_falls_back_to_torch_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_toy(monkeypatch, lambda: copied(torch.empty(64, device=META)), lambda: None)
    (violation,) = compiled.violations
    assert (violation.kernel, violation.sentence) == ("backward", "launches no Triton kernel")


def test_traffic_is_judged_against_the_minimum() -> None:
    assert list(traffic_faults(WORK)) == []
    (fault,) = traffic_faults(Work(Traffic(101, 20), minimum=60, flops=0, allowed=2.0))
    assert fault == ("traffic", "moves 2.02 times the minimum; 2 are allowed")


def test_the_roofline_is_the_slower_of_bandwidth_and_products() -> None:
    h100 = PEAKS["sm_90"]
    assert bound_seconds(3_350_000, 0, h100) == pytest.approx(1e-6)
    assert bound_seconds(3_350_000, 1_978_000_000, h100) == pytest.approx(2e-6)


def test_a_formula_that_disagrees_with_the_count_is_a_violation() -> None:
    agreeing, wrong = (Count(ROPE, "forward", Traffic(5, 4), 0, Traffic(5, n)) for n in (4, 3))
    assert list(disagreements(agreeing)) == []
    (violation,) = disagreements(wrong)
    assert "stores 4 bytes when interpreted; the formula says 5 and 3" in violation.sentence


def test_golden_numbers_show_what_changed(tmp_path: Path) -> None:
    path, compiled = tmp_path / "golden.json", compile_case(ROPE, "sm_90")
    found = golden.entries(
        Sheet(compiled.rows, {(ROPE, d, "sm_90"): w for d, w in compiled.work.items()}, [], [])
    )
    golden.write(found, ["sm_90"], path)
    assert golden.changes(found, ["sm_90"], path) == []
    assert golden.changes({}, ["sm_80"], path) == [], "another target is not looked at"
    key = f"{ROPE} | forward | rope_kernel | sm_90"
    changed = found | {key: found[key] | {"registers": 255, "spill_stores": 8}}
    changed["another | forward | traffic | sm_90"] = {}
    del changed[f"{ROPE} | backward | rope_kernel | sm_90"]
    registers = found[key]["registers"]
    assert golden.changes(changed, ["sm_90"], path) == [
        "another | forward | traffic | sm_90: new",
        f"{ROPE} | backward | rope_kernel | sm_90: gone",
        f"{key}: registers {registers} → 255, spill_stores 0 → 8",
    ]
    text = json.loads(path.read_text())
    text["versions"]["triton"] = "0.1"
    path.write_text(json.dumps(text))
    (said,) = golden.changes(found, ["sm_90"], path)
    assert "'triton': '0.1'" in said
    assert "made by" in said


def test_the_command_prints_compares_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "cases", lambda: [find(ROPE)])
    monkeypatch.setattr(golden, "PATH", tmp_path / "golden.json")
    monkeypatch.setattr(document, "PATH", tmp_path / "audit.md")
    monkeypatch.setattr(command, "ALLOWED", ())
    assert command.audit(["sm_90"], update=True, json_file=tmp_path / "sheet.json") == 0
    shown = capsys.readouterr().out
    assert ROPE in shown
    assert "backward, rope_kernel" in shown
    assert shown.count("│  agrees │") == 2, "traffic was counted for both passes"
    assert f"changed: {ROPE} | forward | rope_kernel | sm_90: new" in shown
    assert shown.splitlines()[-1].startswith("2 kernels for sm_90: 0 violations")
    written = json.loads((tmp_path / "sheet.json").read_text())
    assert written["kernels"][0]["found"]["registers"] > 0
    assert golden.read(tmp_path / "golden.json").keys() == {
        f"{ROPE} | {direction} | {kernel} | sm_90"
        for direction in ("forward", "backward")
        for kernel in ("rope_kernel", "traffic")
    }


def test_the_page_shows_the_golden_numbers() -> None:
    """When this fails: transxssm kernels audit --update."""
    versions = golden.recorded_versions(golden.PATH)
    shown = document.document(golden.read(golden.PATH), versions)
    assert document.PATH.read_text() == shown


def test_an_unknown_target_is_refused() -> None:
    run = CliRunner().invoke(app, ["kernels", "audit", "--target", "sm_70"])
    assert run.exit_code == 2
    assert "target 'sm_70': expected one of sm_80" in run.output


def test_golden_numbers_cover_every_case_and_target() -> None:
    recorded = {tuple(key.split(" | ")[::3]) for key in golden.read(golden.PATH)}
    assert recorded == {(case.name, target) for case in cases() for target in TARGETS}


@pytest.mark.parametrize(
    "name", ["ssd B8 L4096 H16 G16 P128 N128 bf16", "add_rms_norm T32768 N2048 bf16"]
)
def test_golden_numbers_are_those_of_the_kernels(name: str) -> None:
    """When this fails: transxssm kernels audit --update, and read what changed."""
    recorded = golden.read(golden.PATH)
    assert golden.recorded_versions(golden.PATH) == golden.versions()
    compiled = compile_case(name, "sm_90")
    work = {(name, direction, "sm_90"): work for direction, work in compiled.work.items()}
    for key, numbers in golden.entries(Sheet(compiled.rows, work, [], [])).items():
        assert numbers == recorded[key], key
