"""The `transxssm checkpoint` commands: they parse and print, checkpoints_tools does the work."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from pretrain.console import LONGEST_LIST, flat, local, print_fields, print_json, say, whole_console
from untrusted.numbers import counted, number

checkpoint_app = typer.Typer(
    help="Look into, check, compare, average, export and import checkpoints.", no_args_is_help=True
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
COMPARED_TOKENS = 256
LARGEST_SIZE = 1 << 60

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
Step = Annotated[Path, typer.Argument(help="step-* folder, or a run (its latest).")]


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a number of bytes. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {name.lower(): unit for name, unit in UNITS.items()}
    size = float(match[1]) * units.get(match[2].lower(), 0) if match else 0.0
    if not 1 <= size <= LARGEST_SIZE:
        raise typer.BadParameter(f"{text!r} is not a size; write e.g. 5GB, 500MB or 2GiB")
    return int(size)


@checkpoint_app.command("list")
def checkpoint_list(
    folder: Annotated[Path, typer.Argument(help="A run, or a checkpoints folder.")],
    json_output: Json = False,
) -> None:
    """List the committed checkpoints, by their manifests and the sizes of their files.

    `verify --deep` reads every byte.
    """
    from checkpoints_tools.inspection import list_checkpoints

    found = list_checkpoints(folder)
    if json_output:
        print_json(found)
        return
    table = Table(
        "step", "tokens", "processes", "MiB", "saved", "state", Column("folder", no_wrap=True)
    )
    for entry in found:
        whole = entry["problem"] is None
        table.add_row(
            number(entry["step"]),
            number(entry["tokens"]) if whole else "",
            number(entry["world_size"]) if whole else "",
            number(entry["bytes"] / 2**20) if whole else "",
            entry["saved_at"] or "",
            "sizes match" if whole else f"damaged: {entry['problem']}",
            entry["folder"],
        )
    whole_console().print(table)
    print("Only manifests and sizes were checked; `checkpoint verify --deep` reads every byte.")


@checkpoint_app.command("inspect")
def checkpoint_inspect(
    step: Step,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json_output: Json = False,
) -> None:
    """Show step, tokens, layout, versions, sizes; reads the manifest and metadata alone."""
    from checkpoints_tools.inspection import inspect_checkpoint

    fields = inspect_checkpoint(step)
    stored = fields["tensors"]
    if not tensors:
        fields["tensors"] = len(stored)
    if json_output:
        print_json(fields)
        return
    print_fields(flat(fields | {"files": len(fields["files"]), "tensors": len(stored)}))
    if tensors:
        listed = Table("tensor", "shape", "dtype", "bytes", "pieces", "files")
        for name, tensor in stored.items():
            sizes = (f"{tensor['bytes']:,}", str(tensor["pieces"]), str(len(tensor["files"])))
            listed.add_row(name, str(tensor["shape"]), tensor["dtype"], *sizes)
        whole_console().print(listed)


@checkpoint_app.command("verify")
def checkpoint_verify(
    step: Step,
    deep: Annotated[bool, typer.Option("--deep", help="Read and check every byte.")] = False,
    json_output: Json = False,
) -> None:
    """Check sizes and metadata; with --deep every file against its checksum. 1: it is damaged."""
    from checkpoints_tools.verify import verify_checkpoint

    step_dir, problems = verify_checkpoint(step, deep=deep)
    if json_output:
        found = [{"file": problem.file, "what": problem.what} for problem in problems]
        print_json({"folder": str(step_dir), "deep": deep, "problems": found})
    elif problems:
        table = Table("file", Column("what is wrong", overflow="fold"))
        for problem in problems:
            table.add_row(problem.file, problem.what)
        whole_console().print(table)
    if problems:
        files = ", ".join(dict.fromkeys(problem.file for problem in problems))
        from checkpoints_tools.errors import CheckpointError

        raise CheckpointError(f"{step_dir} is damaged ({files}); use another checkpoint")
    if not json_output:
        what = "every byte is" if deep else "sizes and metadata are"
        say(f"{step_dir}: {what} as saved{'' if deep else '; --deep reads all of it'}")


@checkpoint_app.command("diff")
def checkpoint_diff(
    a: Step,
    b: Annotated[Path, typer.Argument(help="Another one.")],
    values: Annotated[
        bool, typer.Option(help="Compare the tensors' values, not only their shapes.")
    ] = True,
    json_output: Json = False,
) -> None:
    """Show how two checkpoints differ: configuration, data, counters, tensors."""
    from checkpoints_tools.difference import diff_checkpoints

    found = diff_checkpoints(a, b, values=values)
    if json_output:
        print_json(found)
        return
    console = whole_console()
    if found["fields"]:
        table = Table("field", "a", "b")
        for name, pair in found["fields"].items():
            table.add_row(name, *(_cell(value) for value in pair))
        console.print(table)
    if found["tensors"]:
        table = Table("tensor", "relative difference", "largest", "elements")
        for entry in found["tensors"]:
            if "problem" in entry:
                table.add_row(entry["name"], entry["problem"])
            else:
                numbers = (f"{entry['relative']:.3e}", f"{entry['largest']:.3e}")
                table.add_row(entry["name"], *numbers, f"{entry['elements']:,}")
        console.print(table)
    compared = f"the {'values' if values else 'shapes'} of {found['tensors_compared']:,} tensors"
    fields = counted(len(found["fields"]), "field")
    print(f"{fields} and {number(len(found['tensors']))} of {compared} differ")


@checkpoint_app.command("export")
def checkpoint_export(
    step: Step,
    out: Annotated[Path, typer.Argument(help="New folder for the model.", callback=local)],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option()] = "fp32",
    max_shard_size: Annotated[
        str, typer.Option(help="Of a safetensors file, e.g. 5GB or 500MB.")
    ] = "5GB",
    verify: Annotated[
        bool,
        typer.Option(
            help="Check the checkpoint's files, and compare the model with what the training code "
            "computes, a layer at a time."
        ),
    ] = True,
    json_output: Json = False,
) -> None:
    """Write a single-GPU model: safetensors, config.json, tokenizer.json, README.md."""
    from checkpoints_tools.export import export_checkpoint
    from checkpoints_tools.folder import resolve

    step_dir = resolve(step)  # once: a run may commit another meanwhile
    report: dict[str, Any] = {"folder": str(out), "dtype": dtype}

    def check(folder: Path) -> None:
        found = _compared(step_dir, folder, dtype, quiet=json_output)
        report["compared_on"], report["differences"] = found

    parameters = export_checkpoint(
        step_dir,
        out,
        dtype,
        max_shard_bytes=parse_size(max_shard_size),
        checksums=verify,
        check=check if verify else None,
    )
    report["parameters"] = parameters
    print_json(report) if json_output else say(f"{out}: {parameters:,} parameters, {dtype}")


def _compared(
    step_dir: Path, folder: Path, dtype: str, *, quiet: bool
) -> tuple[str, list[dict[str, Any]]]:
    """Compare an export with its checkpoint and print how; raises CheckpointError beyond bounds."""
    import torch

    from checkpoints_tools.comparison import compare_export, refuse_excess
    from checkpoints_tools.manifest import read_manifest
    from pretrain.real_text import real_tokens

    state = read_manifest(step_dir)
    length = min(COMPARED_TOKENS, state["config"]["model"]["max_position_embeddings"])
    ids, where = real_tokens(state, step_dir / "tokenizer.json", length)
    differences = compare_export(step_dir, folder, torch.tensor([ids]), dtype)
    if not quiet:
        table = Table("output", "training code's weights", "worst relative difference", "bound", "")
        for d in differences:
            worst, bound = f"{d.worst:.2e}", f"{d.bound:.2e}"
            table.add_row(d.what, d.weights, worst, bound, "" if d.within else "beyond")
        Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(
            table, f"on {len(ids)} tokens of {where}; every tensor is the checkpoint's, bit for bit"
        )
    refuse_excess(differences, folder)
    return where, [asdict(difference) for difference in differences]


@checkpoint_app.command("import")
def checkpoint_import(
    model: Annotated[Path, typer.Argument(help="Folder of an exported model.")],
    out: Annotated[Path, typer.Argument(help="New folder for step-00000000.", callback=local)],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of the run that is to start from it; its data is looked at."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Make a sharded checkpoint of a single-GPU model: step 0, optimizer moments zero."""
    from checkpoints_tools.importing import import_model
    from pretrain.run_dir import git_revision

    of_data: dict[str, Any] = {}
    if config is None:
        tree = _default_tree()
    else:
        from pretrain.config import load_config
        from pretrain.credentials import recorded
        from pretrain.sources import open_blend

        loaded = load_config(config)
        data = open_blend(loaded)
        tree = recorded(loaded)
        of_data = {"data_fingerprint": data.fingerprint, "tokenizer": data.sources[0].tokenizer()}
    step_dir = import_model(model, out, tree, git_revision=git_revision(), **of_data)
    _print_made(step_dir, f"the weights of {model}", json_output)


def _default_tree() -> dict[str, Any]:
    """Every section but [model], as far as nothing is known of the run to come."""
    from data_pipeline.config import DataConfig
    from pretrain.config import Config

    sections = {n: f for n, f in Config.model_fields.items() if n not in ("model", "data")}
    tree = {name: field.default.model_dump(mode="json") for name, field in sections.items()}
    return tree | {"data": DataConfig.model_construct().model_dump(mode="json")}


@checkpoint_app.command("average")
def checkpoint_average(
    steps: Annotated[list[Path], typer.Argument(help="step-* folders of one model.")],
    out: Annotated[Path, typer.Option(help="New folder for step-00000000.", callback=local)],
    json_output: Json = False,
) -> None:
    """Make a sharded checkpoint of the mean of the weights: step 0, optimizer moments zero."""
    from checkpoints_tools.averaging import average_checkpoints
    from pretrain.run_dir import git_revision

    step_dir = average_checkpoints(steps, out, git_revision=git_revision())
    _print_made(step_dir, f"the mean of {len(steps)} checkpoints", json_output)


def _print_made(step_dir: Path, what: str, as_json: bool) -> None:
    print_json({"folder": str(step_dir)}) if as_json else say(f"{step_dir}: {what}")


def _cell(value: Any) -> str:
    """Return a field of a manifest as text, and of a long list the number of its entries."""
    if value is None:
        return "none"
    if isinstance(value, list) and len(value) > LONGEST_LIST:
        return counted(len(value), "entry", "entries")
    return value if isinstance(value, str) else json.dumps(value)
