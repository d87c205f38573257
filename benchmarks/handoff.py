"""Exports in other people's hands: what a colleague does with one, in transformers 4.57 and 5.

    python -m benchmarks.handoff [--export FOLDER] [--quick] [--folder FOLDER]

Every row of handoff_tools, handoff_uses and handoff_fsdp runs in a process that cannot import this
project: Trainer, offloading, adapters, gradient checkpointing, embeddings as input, resizing,
generation in pieces, FSDP. Each compares logits with the plain call's, and gradients where it
trains. Without --export two small models with random weights are exported, with tied embeddings and
without (--quick: tied alone).

FOLDER [build/handoff] holds a virtual environment for each transformers, which is made once: pip
installs transformers, peft and accelerate there, some 100 MB; torch and the rest are those of this
interpreter. It also holds the results: rows that have passed with the same export and code are not
run again; remove the folder to begin from nothing.

Exits with 1 when a row fails, 2 when an environment cannot be made.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.export_memory import write_checkpoint
from checkpoints_tools.export import export_checkpoint
from checkpoints_tools.single_gpu import TransXSSMConfig
from parallel.config import ModelConfig

ENVIRONMENTS = {
    "4.57": ["transformers==4.57.*", "peft>=0.17", "accelerate>=1.10"],
    "5": ["transformers>=5,<6", "peft>=0.18", "accelerate>=1.10"],
}
SHARED = "handoff_export.py"
SCRIPTS = ("handoff_tools.py", "handoff_uses.py", "handoff_fsdp.py")
HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "vocab_size": 262, "hidden_size": 32, "intermediate_size": 48, "num_layers": 4,
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "state_dim": 12, "ssd_groups": 2,
    "chunk_size": 16, "attn_layer_period": 4, "attn_layer_offset": 2, "ssd_skip": True,
    "ssd_conv_width": 4, "max_position_embeddings": 256,
}  # fmt: skip


def make_export(folder: Path, *, tied: bool) -> None:
    """Export a small model of which every weight matters: norms and residuals are scattered."""
    model = ModelConfig(**SIZES, tie_word_embeddings=tied)
    random = torch.Generator().manual_seed(3)

    def value(name: str, shape: torch.Size, _: TransXSSMConfig) -> torch.Tensor:
        values = torch.randn(shape, generator=random) * 0.2
        if name.endswith("dt_bias"):
            return values - 2
        return values + 1 if values.dim() == 1 and not name.endswith("A_log") else values

    with tempfile.TemporaryDirectory() as checkpoints:
        write_checkpoint(Path(checkpoints), model, value)
        export_checkpoint(Path(checkpoints) / "step-00000001", folder)


def environment(folder: Path, version: str, console: Console) -> Path:
    """Python of the environment for a transformers version, made when it is not there yet.

    Raises SystemExit with 2 when pip fails.
    """
    home = folder / f"transformers-{version}"
    python, done = home / "bin" / "python", home / "done.json"
    wanted = ENVIRONMENTS[version]
    if done.exists() and json.loads(done.read_text()) == wanted:
        return python
    packages = ", ".join(wanted)
    console.print(f"{home}: installing {packages} with pip; torch is this interpreter's")
    venv.create(home, with_pip=False, clear=True)
    site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    shared = sysconfig.get_path("purelib")
    (Path(site) / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *wanted]
    if subprocess.run(pip).returncode:
        console.print(f"{packages} cannot be installed into {home}; see pip's message above")
        raise SystemExit(2)
    done.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def fingerprint(export: Path) -> str:
    """Of what a row's result follows from: the export's files and the scripts."""
    digest = hashlib.sha256()
    for path in (
        *sorted(p for p in export.iterdir() if p.is_file()),
        *(HERE / s for s in (SHARED, *SCRIPTS)),
    ):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_rows(python: Path, export: Path, results: Path) -> list[dict[str, Any]]:
    """The results of every row; those that passed before are taken from `results`."""
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= {"HF_HOME": str(results.parent / "hf"), "PYTHONPATH": str(HERE)}
    problems = []
    results.touch()
    for script in SCRIPTS:
        # -P: neither the present folder nor the script's is searched for modules
        words = [str(python), "-P", str(HERE / script), str(export), str(results)]
        done = subprocess.run(
            words, cwd=results.parent, env=os.environ | variables, capture_output=True, text=True
        )
        log = results.with_suffix(f".{script.removesuffix('.py')}.log")
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode not in (0, 3):  # it has died, whatever rows it had come to
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            problems.append({"item": "", "row": script, "problem": f"{last} (see {log})"})
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    return list({entry["row"]: entry for entry in entries}.values()) + problems


def main(arguments: list[str]) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.handoff")
    parser.add_argument("--export", type=Path, help="an exported model [two small ones are made]")
    parser.add_argument("--quick", action="store_true", help="the tied model alone")
    parser.add_argument("--folder", type=Path, default=Path("build/handoff"), help="environments")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.export is not None:
        exports = {options.export.resolve().name: options.export.resolve()}
    else:
        kinds = ("tied",) if options.quick else ("tied", "untied")
        exports = {kind: folder / f"export-{kind}" for kind in kinds}
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            for kind, place in exports.items():
                make_export(Path(fresh) / kind, tied=kind == "tied")
                if not place.exists() or fingerprint(place) != fingerprint(Path(fresh) / kind):
                    shutil.rmtree(place, ignore_errors=True)
                    (Path(fresh) / kind).rename(place)
    pythons = {version: environment(folder, version, console) for version in ENVIRONMENTS}
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    for version, python in pythons.items():
        for kind, export in exports.items():
            results = folder / f"results-{version}-{kind}-{fingerprint(export)}.jsonl"
            entries = run_rows(python, export, results)
            columns[f"{version}, {kind}"] = {entry["row"]: entry for entry in entries}
    return report(columns, console)


def report(columns: dict[str, dict[str, dict[str, Any]]], console: Console) -> int:
    """Print a row for each use and a column for each transformers and export; the exit code."""
    rows = {row: entry["item"] for column in columns.values() for row, entry in column.items()}
    table = Table("item", "row", *columns, title="worst relative difference from the plain call")
    failed = []
    for row, item in rows.items():
        cells = []
        for name, column in columns.items():
            entry = column.get(row, {"problem": "not run"})
            cells.append("FAILED" if entry["problem"] else f"{entry['worst']:.1e}")
            if entry["problem"]:
                failed.append(f"{row} ({name}): {entry['problem'][:300]}")
        table.add_row(item, row, *cells)
    console.print(table)
    for line in failed:
        console.print(line)
    count = len(rows) * len(columns)
    console.print(f"{count - len(failed)} of {count} uses give what the plain call gives")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
