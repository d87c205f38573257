"""Triton's own kernels agree with PyTorch in the checks that training begins with."""

from typing import Any

import pytest
import torch

from kernels import paths
from pretrain.kernel_check import SMALLEST, check


def test_no_kernel_fails_its_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from parallel.config import ModelConfig

    monkeypatch.setattr(paths, "_off", set[Any]())
    assert check(ModelConfig.model_validate(SMALLEST), torch.device("cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:-7].strip() for line in lines if line.startswith("OK") and "agrees" in line] == [
        "cross_entropy", "rms_norm", "weighted_residual", "add_rms_norm", "swiglu", "rotate_qk",
        "apply_rope", "ssd", paths.COLUMN_SLICES,
    ]  # fmt: skip
    assert lines[-1] == "no path fails"
