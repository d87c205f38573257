"""The `transxssm evaluate` command: parses."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from parallel import bounds
from pretrain import stop
from pretrain.console import local
from pretrain.text_options import DocumentSeparator, TextFields


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A run, a checkpoint of it, or an exported model's folder.")
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Prepared folder of sequences, repeatable.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="File or folder of text, repeatable.")
    ] = None,
    text_field: TextFields = None,
    document_separator: DocumentSeparator = "",
    needle: Annotated[
        bool, typer.Option("--needle", help="Hide a number in the text and ask for it.")
    ] = False,
    recall: Annotated[
        bool, typer.Option("--recall", help="Show pairs of tokens and ask for them.")
    ] = False,
    cases: Annotated[
        int, typer.Option(min=1, max=10_000, help="Of these two, a cell of the picture.")
    ] = 8,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")
    ] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of task files of your own.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=bounds.TOKENS, help="Sequences or documents of each, at most."),
    ] = None,
    max_length: Annotated[
        int,
        typer.Option(
            min=0, max=bounds.LENGTH, help="Tokens of a row; 0: as many as the model is meant for."
        ),
    ] = 0,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights.")] = "fp32",
    tensor: Annotated[
        int | None, typer.Option(min=1, max=bounds.RANKS, help="Of a sharded model's layout.")
    ] = None,
    pipeline: Annotated[int | None, typer.Option(min=1, max=bounds.RANKS)] = None,
    context: Annotated[int | None, typer.Option(min=1, max=bounds.RANKS)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json and pictures.", callback=local)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Perplexity, bits per byte, and what is found in the context, of a sharded or exported model.

    A sharded one runs in any layout, under torchrun or srun as in training; by default in its own,
    where the ranks fit it.
    """
    stop.listen()
    from parallel.launch import launch_from_environment
    from pretrain.open_files import raise_open_files

    raise_open_files()
    launch = launch_from_environment()
    from parallel.compat import prepare_host

    prepare_host(launch.local_rank)
    from pretrain.evaluation.command import Asked, run

    sizes = {"tensor": tensor, "pipeline": pipeline, "context": context}
    run(
        model,
        launch,
        Asked(
            data=tuple(data or ()),
            text=tuple(text or ()),
            text_field=tuple(text_field or ("text",)),
            document_separator=document_separator,
            needle=needle,
            recall=recall,
            cases=cases,
            tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
            include_path=include_path,
            limit=limit,
        ),
        {name: size for name, size in sizes.items() if size is not None},
        dtype=dtype,
        max_length=max_length,
        out=out,
        json_output=json_output,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's end would wait for what libraries leave running
