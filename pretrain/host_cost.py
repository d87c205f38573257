"""What the host does for one layer, forward and backward: Python calls and microseconds.

    python -m pretrain.host_cost MODEL LAYER DTYPE SMS FOLDER        # prints one JSON value

A process of its own: Triton's driver is replaced for good. The layer is the configured one with
heads, channels and tokens so few that the operations of aten take no time on a CPU; the GPU is one
of SMS multiprocessors. Triton launches through its own launcher over a driver library that does
nothing (`kernels.audit.stub_driver`), built in FOLDER. Attention itself is PyTorch's on a CPU.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kernels.audit.compiling import TARGETS
from parallel.config import ModelConfig, ParallelConfig
from pretrain.config import Config

REPEATS, WARM_UP = 150, 20
SEQUENCES, TOKENS, HEADS = 2, 64, 4


@dataclass(frozen=True)
class HostCost:
    """Of one layer. Microseconds are the process's, the tenth part of the calls was faster."""

    python_calls: int
    forward_microseconds: float
    microseconds: float  # forward and backward


def host_cost(config: Config, layer: str) -> HostCost | str:
    """Measure a layer, "ssd" or "attention", on one thread; or why that cannot be."""
    model = config.model
    # the scan chooses its kernels by how many sequences of heads there are for a multiprocessor
    sequences = config.training.micro_batch_size * model.num_heads // config.parallel.tensor
    sms = max(1, TARGETS["sm_90"].num_sms * SEQUENCES * HEADS // sequences)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pretrain.host_cost"]
        arguments = [model.model_dump_json(), layer, config.training.dtype, str(sms), folder]
        settings = {
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": folder,
            "TRANSXSSM_KERNELS": "triton",
        }
        settings |= {"PYTHONWARNINGS": "ignore", "TRANSXSSM_STRICT": "0"}
        run = subprocess.run(
            [*command, *arguments], env=os.environ | settings, capture_output=True, text=True
        )
    if run.returncode:
        return run.stderr.strip().splitlines()[-1]
    return HostCost(**json.loads(run.stdout.splitlines()[-1]))


def small(model: ModelConfig, layer: str) -> ModelConfig:
    """One layer of that kind, with the options of `model` and as small as Triton allows."""
    return ModelConfig.model_validate(
        model.model_dump()
        | {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_layers": 1,
            "num_heads": HEADS,
            "num_kv_heads": HEADS if model.num_kv_heads == model.num_heads else HEADS // 2,
            "head_dim": 16,
            "state_dim": 16,
            "ssd_groups": HEADS if model.ssd_groups == model.num_heads else HEADS // 2,
            "attn_layer_period": 1,
            "attn_layer_offset": 0 if layer == "attention" else 1,
        }
    )


def _layer_calls(
    model: ModelConfig, dtype_name: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward, and forward and backward, of the only layer."""
    import torch

    from parallel.build import DTYPES, build_stage
    from parallel.compat import prepare_host
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import Launch

    device = prepare_host()
    init_distributed(Launch(0, 1, 0), device)
    init_groups(ParallelConfig())
    dtype = DTYPES[dtype_name]
    stage = build_stage(
        model, ParallelConfig(), seq_len=TOKENS, dtype=dtype, seed=0, deterministic=False,
        device=device,
    ).chunks[0]  # fmt: skip
    boundaries = torch.arange(SEQUENCES + 1, dtype=torch.int32) * TOKENS
    ids = torch.arange(TOKENS, dtype=torch.int32).repeat(SEQUENCES, 1)
    positions = stage.positions(ids, boundaries, None)
    layer = stage.model.layers["0"]
    shape = (SEQUENCES * TOKENS, 1, model.hidden_size)
    h, normed = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    gradients = torch.randn_like(h), torch.randn_like(h)
    inputs = [h, normed, *layer.parameters()]

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        # its own norm in place of the next layer's
        after: tuple[torch.Tensor, torch.Tensor] = layer(
            h, normed, positions, layer.pre_sequence_layernorm
        )
        return after

    return forward, lambda: torch.autograd.grad(forward(), inputs, gradients)


def count_calls(function: Callable[[], object]) -> int:
    """Calls that Python makes: of functions in Python, and of those in C by their names."""
    calls = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def microseconds(function: Callable[[], object]) -> float:
    """Process time that a tenth of the calls do not exceed."""
    for _ in range(WARM_UP):
        function()
    gc.collect()
    gc.disable()
    times = []
    for _ in range(REPEATS):
        begin = time.process_time_ns()
        function()
        times.append(time.process_time_ns() - begin)
    gc.enable()
    return sorted(times)[len(times) // 10] / 1000


def measure(model: ModelConfig, dtype: str, sms: int, folder: Path) -> HostCost:
    """Measure the only layer of `model` in this process, whose Triton driver is replaced for good.

    Raises NoCompilerError.
    """
    from kernels import dispatch
    from kernels.audit.stub_driver import activate, build_stub

    build_stub(folder)
    activate(replace(TARGETS["sm_90"], num_sms=sms), folder)
    # tensors may be on the CPU
    dispatch.interpreting = lambda: True  # type: ignore[assignment]
    forward, both = _layer_calls(model, dtype)
    both()
    return HostCost(count_calls(both), microseconds(forward), microseconds(both))


def main(model: str, layer: str, dtype: str, sms: str, folder: str) -> int:
    """Print the measurement. Returns the exit code, 1 where this host cannot make it."""
    from kernels.audit.stub_driver import NoCompilerError

    warnings.filterwarnings("ignore")
    alone = small(ModelConfig.model_validate_json(model), layer)
    try:
        print(json.dumps(asdict(measure(alone, dtype, int(sms), Path(folder)))))
    except NoCompilerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
