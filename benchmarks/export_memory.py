"""Memory of exporting, importing and averaging: it must not grow with the model.

    python -m benchmarks.export_memory [--quick] [--folder FOLDER]

Makes a checkpoint of 2.4 GB of weights (--quick: 0.6 GB), as one rank would write it: every tensor
in one piece, an embedding of 1 GB among them. Each command runs in a process of its own. Exports
are those of `transxssm checkpoint export`, with its checks: every file's checksum, every tensor,
every layer and the logits against the training code.

The baseline is the resident memory of that same process after its imports and before the command:
torch, and for exports Megatron-core and DeepSpeed as well, which the checks need. The peak (VmHWM,
reset at the baseline; it counts pages of mapped files too) is to stay less than 1 GB above it, and
below the size of the weights. Exported files are read back with the safetensors library and
compared.

Exits with 1 when a bound is missed or a value is wrong.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from checkpoints_tools import folder as folders
from checkpoints_tools.manifest import read_manifest
from checkpoints_tools.single_gpu import TransXSSMConfig, initial_value
from checkpoints_tools.source import parameter_shapes, single_gpu_config
from checkpoints_tools.stored_writer import Blocks, write_untrained_state
from parallel.config import ModelConfig

BOUND = 10**9
SIZES: dict[str, dict[str, Any]] = {
    "full": {"vocab_size": 131072, "hidden_size": 2048, "intermediate_size": 6144, "num_layers": 6},
    "quick": {"vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 4096, "num_layers": 5},
}
# what each process runs: (folder of the checkpoint, folder of results)
COMMANDS = {
    "export (default, verified)": "checkpoint_app(['export', str(a), str(out / 'fp32')], **whole)",
    "export bf16, files of 500 MB, verified": (
        "checkpoint_app(['export', str(a), str(out / 'bf16'), '--dtype', 'bf16',"
        " '--max-shard-size', '500MB'], **whole)"
    ),
    "import fp32": "import_model(out / 'fp32', out / 'imported', {})",
    "average": "average_checkpoints([a, out / 'imported'], out / 'average')",
}
PROGRAM = """
import json, os, sys, time
from pathlib import Path
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from checkpoints_tools.averaging import average_checkpoints
from checkpoints_tools.importing import import_model
if VERIFIES:  # what the command itself would import
    import checkpoints_tools.comparison, checkpoints_tools.export, parallel.compat
    import parallel.build, parallel.groups, parallel.model, pretrain.real_text, tokenizers
    from pretrain.checkpoint_cli import checkpoint_app
    parallel.compat.prepare_host()
whole = {"standalone_mode": False}

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

a, out = Path(sys.argv[1]), Path(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")
before, begin = resident("VmRSS"), time.perf_counter()
COMMAND
seconds = time.perf_counter() - begin
print(json.dumps({"before": before, "peak": resident("VmHWM"), "seconds": seconds}))
"""


def make_checkpoint(folder: Path, size: dict[str, Any]) -> int:
    """FOLDER/step-00000001 of initial weights, each in one piece; bytes of the weights."""
    sizes: dict[str, Any] = {
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": size["hidden_size"] // 16,
    }
    model = ModelConfig(**size, **sizes, ssd_groups=4, attn_layer_period=3, attn_layer_offset=2)
    random = torch.Generator().manual_seed(1)
    return write_checkpoint(
        folder, model, lambda name, shape, config: initial_value(name, shape, config, random)
    )


def write_checkpoint(
    folder: Path,
    model: ModelConfig,
    value: Callable[[str, torch.Size, TransXSSMConfig], torch.Tensor],
) -> int:
    """Write FOLDER/step-00000001 of weights that `value` makes by name and shape, each in one
    piece, with a tokenizer of bytes. Returns the bytes of the weights."""
    tokenizer = byte_tokenizer()
    state = {
        "tokens": 0, "samples": 0, "skipped_shards": [], "adam_step": 0, "world_size": 1,
        "config": {"model": model.model_dump(mode="json")}, "data_fingerprint": "",
        "tokenizer_hash": hashlib.sha256(tokenizer).hexdigest(), "eod_id": 0, "pad_id": 1,
        "git_revision": "",
    }  # fmt: skip
    config = single_gpu_config(state, "fp32")
    shapes = parameter_shapes(config)
    temporary = folders.begin(folder, 1)
    (temporary / "tokenizer.json").write_bytes(tokenizer)

    def read(name: str) -> Blocks:
        values = value(name, torch.Size(shapes[name]), config)
        yield range(len(values)), values

    entries = write_untrained_state(temporary, shapes, read)
    folders.commit(folder, 1, state, entries)
    return 4 * sum(prod(shape) for shape in shapes.values())


def byte_tokenizer() -> bytes:
    """tokenizer.json of bytes, and of a token for the end of documents and for padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # type: ignore[import-untyped]

    special = ["<eod>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text: str = tokenizer.to_str()
    return text.encode()


def measure(command: str, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Peak and baseline of resident memory in bytes, and seconds, of a process of its own."""
    program = PROGRAM.replace("COMMAND", command)
    program = program.replace("VERIFIES", str("checkpoint_app" in command))
    words = [sys.executable, "-c", program, str(checkpoint), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def wrong_values(checkpoint: Path, model: Path, dtype: torch.dtype) -> list[str]:
    """Names of exported tensors that are not the checkpoint's, read by the library."""
    from checkpoints_tools.export import stored_dtype
    from checkpoints_tools.stored import StoredTensors

    step_dir = folders.resolve(checkpoint)
    stored = StoredTensors(step_dir, read_manifest(step_dir)["files"])
    left, wrong = set(stored.shapes("weight")), []
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                left.discard(name)
                part = file.get_slice(name)
                target = stored_dtype(name, dtype)
                for rows, block in stored.blocks(f"weight.{name}"):
                    if not torch.equal(part[rows.start : rows.stop], block.to(target)):
                        wrong.append(name)
    return wrong + sorted(left)


def main(arguments: list[str]) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.export_memory")
    parser.add_argument("--quick", action="store_true", help="0.6 GB of weights")
    parser.add_argument("--folder", help="where there is room for 20 GB [the temporary folder]")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        begin = time.perf_counter()
        size = make_checkpoint(folder / "a", SIZES["quick" if options.quick else "full"])
        console.print(f"made {size / 1e9:.2f} GB of weights in {time.perf_counter() - begin:.0f} s")
        bound = min(BOUND, size)
        table = Table("command", "before MB", "peak MB", "above MB", "seconds", "MB/s of weights")
        above = {}
        for what, command in COMMANDS.items():
            found = measure(command, folder / "a", folder)
            above[what] = found["peak"] - found["before"]
            numbers = (found["before"], found["peak"], above[what])
            rate = f"{size / found['seconds'] / 1e6:,.0f}"
            cells = [f"{n / 1e6:,.0f}" for n in numbers]
            table.add_row(what, *cells, f"{found['seconds']:.1f}", rate)
        wrong = wrong_values(folder / "a", folder / "fp32", torch.float32)
        wrong += wrong_values(folder / "a", folder / "bf16", torch.bfloat16)
    console.print(table)
    if wrong:
        console.print(f"wrong values in {', '.join(wrong[:8])}")
    worst = max(above.values())
    missed = worst > bound or bool(wrong)
    console.print(
        f"{size / 1e9:.2f} GB of weights: at most {worst / 1e6:,.0f} MB above the interpreter, "
        f"bound {bound / 1e6:,.0f} MB: {'MISSED' if missed else 'met'}"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
