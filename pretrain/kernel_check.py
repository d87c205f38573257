"""`transxssm doctor --kernels`: fast paths beside plain ones, a line each (`parallel.self_check`).

    python -m pretrain.kernel_check        # on a host without a GPU, under Triton's interpreter

Triton decides whether it interprets when it is imported, so this is a process of its own there.
"""

import os
import subprocess
import sys
import warnings

import torch
from rich.console import Console
from rich.text import Text

from parallel.config import ModelConfig

NO_GPU = (
    "no GPU here: kernels are interpreted, not compiled, on the smallest sizes; float32 sums inside"
    " products are not checked, since only CUDA has them"
)
SMALLEST = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "state_dim": 16,
            "ssd_groups": 1}  # fmt: skip


def run_here() -> int:
    """Check the paths of this host's first GPU, or interpret the kernels. Returns the exit code."""
    if torch.cuda.is_available():
        return check(ModelConfig(), torch.device("cuda", 0))
    print(NO_GPU, flush=True)
    settings = {"TRITON_INTERPRET": "1", "TRANSXSSM_KERNELS": "triton", "TRANSXSSM_STRICT": "0"}
    command = [sys.executable, "-m", "pretrain.kernel_check"]
    return subprocess.run(command, env=os.environ | settings).returncode


def check(model: ModelConfig, device: torch.device) -> int:
    """Print the outcome of every check in bf16. Returns 0 when none fails, else 1."""
    from parallel.self_check import SelfCheckError, run_checks

    console = Console(highlight=False, soft_wrap=True, markup=False)
    failed = checked = 0
    try:
        for one, reason in run_checks(model, device, torch.bfloat16):
            checked, failed = checked + 1, failed + (reason is not None)
            line = Text("FAIL " if reason else "OK   ", style="bold red" if reason else "green")
            console.print(line.append(f"{one.path:<29}{reason or 'agrees'}", style="default"))
            if reason:
                console.print(f"{'':34}→ training does without: {one.instead} instead")
    except SelfCheckError as error:
        console.print(Text("FAIL ", style="bold red").append(str(error), style="default"))
        return 1
    if not checked:
        console.print("nothing to check: TRANSXSSM_KERNELS keeps the kernels from running")
    else:
        console.print(f"{failed} of {checked} paths fail" if failed else "no path fails")
    return 1 if failed else 0


def main() -> int:
    """Interpret the kernels on the CPU."""
    from kernels.audit.interpreter import install

    warnings.filterwarnings("ignore")
    install()
    return check(ModelConfig.model_validate(SMALLEST), torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
