"""`transxssm prepare`, `tokenizer ...` and `data ...`, on text and prepared shards.

Heavy imports happen inside the command that needs them.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from parallel import bounds
from pretrain.console import expanded, local, print_fields, say, shown
from pretrain.text_options import DocumentSeparator, Strict, TextFields
from untrusted.numbers import counted, number

tokenizer_app = typer.Typer(
    help="Train or inspect a byte-level BPE tokenizer.", no_args_is_help=True
)
data_app = typer.Typer(help="Look into prepared shards.", no_args_is_help=True)
Inputs = Annotated[
    list[str],
    typer.Argument(help="Files, folders or globs of text, JSON lines or Parquet; also .gz, .zst."),
]


def prepare(
    inputs: Inputs,
    out: Annotated[
        str,
        typer.Option(
            help="New folder for train/ and validation/ shards, or a URL (s3://...).",
            callback=expanded,
        ),
    ],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, or a folder that holds one.")],
    seq_len: Annotated[
        int, typer.Option(min=1, max=bounds.LENGTH, help="Tokens a sequence.")
    ] = 1024,
    packing: Annotated[
        Literal["best_fit", "concat"], typer.Option(help="How documents fill sequences.")
    ] = "best_fit",
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of documents held out.")
    ] = 0.02,
    text_field: TextFields = None,
    document_separator: DocumentSeparator = "",
    strict: Strict = False,
    max_lost_characters: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of a sample's characters that the tokenizer may lose."
        ),
    ] = 0.001,
    end_of_text: Annotated[
        str | None,
        typer.Option(help="Token that ends every document.", show_default="the tokenizer's own"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=bounds.SEED, help="Of the train/validation split.")
    ] = 1234,
    format: Annotated[Literal["mds", "webdataset"], typer.Option(help="Of the shards.")] = "mds",
    compression: Annotated[
        Literal["none", "zstd"], typer.Option(help="Of the shards; readers keep them unpacked.")
    ] = "none",
    workers: Annotated[
        int, typer.Option(min=0, max=bounds.RANKS_PER_NODE, help="Processes; 0: one a core.")
    ] = 0,
    shard: Annotated[
        str, typer.Option(help="i/n: do the i-th of n shares of the work, for a job array.")
    ] = "",
    merge: Annotated[
        bool, typer.Option("--merge", help="Put the shares together, once all are done.")
    ] = False,
) -> None:
    """Tokenise text and pack it into shards. Run again after a kill: it goes on.

    A job array runs it with the same options and --shard 1/N to N/N, then once with --merge.
    """
    from data_pipeline.prepare import Progress as Done
    from data_pipeline.prepare import prepare as run
    from data_pipeline.reading import empty_rows_message

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("preparing", total=None)

        def report(done: Done) -> None:
            rates = f"{done.megabytes_per_second:.1f} MB/s  {done.tokens_per_second:,.0f} tokens/s"
            text = f"{rates}  {done.tokens:,} tokens"
            bar.update(task, completed=done.bytes_done, total=done.bytes_total, description=text)

        metas = run(
            [Path(i) for i in inputs],
            tokenizer,
            out,
            seq_len,
            packing=packing,
            validation_fraction=validation_fraction,
            text_field=text_field or "text",
            seed=seed,
            progress=report,
            document_separator=document_separator,
            strict=strict,
            max_lost=max_lost_characters,
            tell=say,
            format=format,
            compression=compression,
            end_of_text=end_of_text,
            workers=workers,
            share=_share(shard),
            merge=merge or not shard,
        )
    if empty_rows := sum(meta.empty_rows for meta in metas.values()):
        say(empty_rows_message(empty_rows))
    for split, meta in metas.items():
        filled = meta.tokens / (meta.tokens + meta.padding)
        say(
            f"{out}/{split}: {counted(meta.samples, 'sequence')}, "
            f"{counted(meta.tokens, 'token')} from {counted(meta.documents, 'document')} "
            f"({number(meta.cut_documents)} cut), {filled:.2%} filled, "
            f"unigram entropy {meta.unigram_entropy:.4f} nats"
        )


def _share(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; all of it where nothing is said."""
    parts = (text or "1/1").split("/")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 7 for part in parts):
        raise typer.BadParameter(f"--shard {text!r}: write i/n, for example 3/16")
    return int(parts[0]), int(parts[1])


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Where tokenizer.json goes.", callback=local)],
    vocab_size: Annotated[int, typer.Option(min=258, max=bounds.VOCABULARY)] = 8192,
    text_field: TextFields = None,
    document_separator: DocumentSeparator = "",
    strict: Strict = False,
) -> None:
    """Train a byte-level BPE on text."""
    from data_pipeline.tokenizer import train_tokenizer

    made = train_tokenizer(
        [Path(i) for i in inputs],
        out,
        vocab_size,
        text_field or "text",
        document_separator=document_separator,
        strict=strict,
    )
    say(str(made))


@tokenizer_app.command("inspect")
def tokenizer_inspect(
    tokenizer: Path,
    text: Annotated[str, typer.Option(help="Text to encode.")] = "The quick brown fox, 3.14159.",
    end_of_text: Annotated[
        str | None,
        typer.Option(help="Token that ends every document.", show_default="the tokenizer's own"),
    ] = None,
) -> None:
    """Show size, special tokens and what it makes of a text."""
    from data_pipeline.tokenizer import inspect_tokenizer

    print_fields(inspect_tokenizer(tokenizer, text, end_of_text))


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[
        str, typer.Argument(help="What `prepare` wrote, or one split of it; or a URL.")
    ],
) -> None:
    """Show counts, lengths, the fingerprint and a decoded sample."""
    from data_pipeline.inspection import inspect_dataset

    for split, fields in inspect_dataset(folder).items():
        print_fields({"split": split} | fields)


@data_app.command("verify")
def data_verify(
    folder: Annotated[
        str, typer.Argument(help="What `prepare` wrote, or one split of it; or a URL.")
    ],
) -> None:
    """Read every shard and check it against its size and hash."""
    from data_pipeline.inspection import verify_dataset

    verify_dataset(folder)
    print(shown(f"{folder}: every shard is sound"))
