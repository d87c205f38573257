"""Options of every command that reads text: how inputs become documents."""

from typing import Annotated

import typer

TextFields = Annotated[
    list[str] | None,
    typer.Option(
        "--text-field",
        help="Field of rows (JSON lines, Parquet) that is the text, or a path: content.text; "
        "once for all inputs, or once for each, in their order.",
        show_default="text",
    ),
]
DocumentSeparator = Annotated[
    str,
    typer.Option(
        help=r"String between the documents of a text file, such as '<|endoftext|>'; '\n\n' for "
        "blank lines.",
        show_default="a file is one document",
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail on a row whose text is null or missing, not skip it."),
]
