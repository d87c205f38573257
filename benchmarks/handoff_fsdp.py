"""An export under FSDP1 and FSDP2 in bf16, as its README.md says; run by benchmarks.handoff.

    python handoff_fsdp.py EXPORT RESULTS [ROW ...]

Two processes over gloo train a step with Adam, each on one row of a batch. The wrapping is the
README's code, run from there. Compared with the export loaded in bf16 and run row by row on one
process: logits, loss, and every gradient. A_log, dt_bias and D have to be float32 inside `forward`,
and every parameter must move.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from handoff_export import Export, difference, gradients, run, worst
from torch import Tensor

BOUND = 0.02  # bf16's own: gradients of two rows are summed in another order
NAMES = {"FSDP2": "FSDP2, bf16, as the card has it", "FSDP1": "FSDP1, bf16, as the card has it"}


def card_code(folder: Path, heading: str) -> str:
    """The Python of the README.md under a heading that begins so."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"### {heading}.*?```python\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md has no code under {heading}"
    return found[1]


def wrapped(folder: Path, kind: str, model: Any) -> Any:
    """The model as the README's code wraps it."""
    space: dict[str, Any] = {"model": model, "torch": torch, "device": torch.device("cpu")}
    exec(card_code(folder, kind), space)
    return space["model"]


def rank_step(rank: int, folder: str, kind: str, dtype: torch.dtype, place: str) -> None:
    """One rank's share; rank 0 leaves logits and gradients at `place`."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    export = Export(Path(folder), plain=False)
    model = wrapped(Path(folder), kind, export.load(dtype=dtype).train())
    seen: dict[str, torch.dtype] = {}

    def look(module: Any, *_: Any) -> None:
        names = ("A_log", "dt_bias", "D")
        seen.update({n: getattr(module, n).dtype for n in names if getattr(module, n) is not None})

    for module in model.modules():
        if type(module).__name__.removeprefix("FSDP") == "SSD":
            module._scan = watch(module, look)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ids = export.ids[rank : rank + 1]
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads, before = gathered(model, kind, "grad"), gathered(model, kind, "data")
    optimizer.step()
    after = gathered(model, kind, "data")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    torch.save(
        {"logits": output.logits.detach(), "loss": output.loss.detach(), "dtypes": seen,
         "grads": grads if rank == 0 else {}, "moved": len(moved), "of": len(before)},
        f"{place}/rank-{rank}",
    )  # fmt: skip
    dist.destroy_process_group()


def watch(module: Any, look: Any) -> Any:
    original = module._scan

    def scan(*arguments: Any) -> Any:
        look(module)
        return original(*arguments)

    return scan


def gathered(model: Any, kind: str, attribute: str) -> dict[str, Tensor]:
    """Whole gradients or values by the parameter's name in the export, float32."""
    if kind == "FSDP2":
        tensors = {n: getattr(p, attribute) for n, p in model.named_parameters()}
        return {name: t.full_tensor().float().clone() for name, t in tensors.items()}
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, with_grads=True, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): getattr(p, attribute).float().clone()
            for name, p in model.named_parameters()
        }


def compare(export: Export, kind: str, dtype: torch.dtype) -> float:
    """The largest relative difference. Raises AssertionError."""
    with tempfile.TemporaryDirectory() as place:
        multiprocessing.start_processes(
            rank_step, (str(export.folder), kind, dtype, place), nprocs=2, start_method="fork"
        )
        ranks = [torch.load(f"{place}/rank-{rank}") for rank in range(2)]
    model = export.load(dtype=torch.bfloat16).train()
    outputs, grads = [], []
    for ids in export.ids.split(1):
        grads.append({n: g.float() for n, g in gradients(model, input_ids=ids, labels=ids).items()})
        outputs.append(model(ids, labels=ids))
    for rank in ranks:
        kept = set(rank["dtypes"].values())
        assert kept <= {torch.float32}, f"inside forward: {rank['dtypes']}"
        assert rank["moved"] == rank["of"], f"{rank['of'] - rank['moved']} parameters do not train"
    found = 0.0
    for rank, output in zip(ranks, outputs, strict=True):
        found = max(found, difference(rank["logits"], output.logits.detach()))
        found = max(found, difference(rank["loss"], output.loss.detach()))
    mean = {name: (grads[0][name] + grads[1][name]) / 2 for name in grads[0]}
    return max(found, worst(ranks[0]["grads"], mean))


ROWS = [
    (
        "26",
        f"{label}, loaded in {str(dtype).removeprefix('torch.')}",
        lambda export, kind=kind, dtype=dtype: compare(export, kind, dtype),
    )
    for kind, label in NAMES.items()
    for dtype in (torch.float32, torch.bfloat16)
]

if __name__ == "__main__":
    sys.exit(run(ROWS, BOUND, sys.argv[1:], plain=False))
