"""The `transxssm` command. Heavy imports happen inside the command that needs them."""

import contextlib
import errno
import logging
import os
import sys
import time
import traceback
import warnings
from logging import FileHandler
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from parallel import bounds
from pretrain import stop
from pretrain.checkpoint_cli import checkpoint_app
from pretrain.console import LogFormatter, local, print_fields, say, shown
from pretrain.evaluation import cli as evaluation_command
from pretrain.text_options import DocumentSeparator, Strict, TextFields
from slurm import cli as job_commands
from untrusted.errors import UserError, is_panic
from untrusted.numbers import counted, number
from untrusted.secrets import remember

app = typer.Typer(
    name="transxssm",
    help="Pretrain TransXSSM, a hybrid of attention and state-space layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
tokenizer_app = typer.Typer(
    help="Train or inspect a byte-level BPE tokenizer.", no_args_is_help=True
)
data_app = typer.Typer(help="Look into prepared shards.", no_args_is_help=True)
kernels_app = typer.Typer(help="Audit, count, time and tune the kernels.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(kernels_app, name="kernels")

WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=WITH_OVERRIDES)(job_commands.submit)
for command in (job_commands.runs, job_commands.status, job_commands.logs, job_commands.cancel):
    app.command()(command)
app.command()(evaluation_command.evaluate)

REPORT_IT = "This is a fault of transxssm itself: please report it, with the lines above."
SECONDS_TO_CAUSE = 8.0  # until another rank has said why it broke the collectives of this one
Inputs = Annotated[
    list[str],
    typer.Argument(help="Files, folders or globs of text, JSON lines or Parquet; also .gz, .zst."),
]


def main() -> None:
    """Run the command. An error that a user can act on is one paragraph, any other a traceback."""
    started = time.time()
    _quiet_libraries()
    for word in sys.argv:
        remember(word.partition("=")[2] if word.startswith("-") else word, is_value=True)
    try:
        try:
            app()
        except SystemExit:
            _flush_output()
            raise
    except BrokenPipeError:  # as by `| head`: whoever read has seen enough
        os._exit(1)
    except MemoryError:
        stop.end_without_memory()
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        try:
            _fail(error, started)
        except MemoryError:
            stop.end_without_memory()
        except (OSError, ImportError) as second:  # not even our own modules can be read
            with contextlib.suppress(OSError):
                os.write(2, f"error: {_exhausted(second) or second}\n".encode())
            os._exit(1)


def _fail(error: BaseException, started: float) -> NoReturn:
    """Report the error, or the one of another rank that broke this one's collectives, and exit."""
    from parallel.launch import LaunchError, host_name, launch_from_environment
    from pretrain.failure import announce, first_failure, is_echo
    from pretrain.starts import record_ended

    files = [h for h in logging.getLogger("transxssm").handlers if isinstance(h, FileHandler)]
    logs = Path(files[0].baseFilename).parent if files else None
    message = str(error) if _is_users(error) else _exhausted(error)
    who, cause = "", None
    with contextlib.suppress(LaunchError):  # the error itself
        if launch_from_environment().world_size > 1:
            who = f"rank {launch_from_environment().rank} on {host_name()}: "
    if who and logs is not None:
        if message is None and is_echo(error):
            cause = first_failure(logs, started, SECONDS_TO_CAUSE)
        failed = f"{who}{message or f'{type(error).__name__}: {error}'}"
        announce(logs, failed, started)
    if cause is not None:
        report = f"error: stopped because another rank failed: {cause}"
    elif message is not None:
        report = f"error: {message}"
    else:
        report = "".join(traceback.format_exception(error))
        if who:
            report = f"error: {who}{type(error).__name__}: {error}\n{report}"
        report += REPORT_IT
    report = shown(report)
    record_ended("failed", cause or message or f"{type(error).__name__}: {error}")
    with contextlib.suppress(OSError):
        print(report, file=sys.stderr, flush=True)
    for handler in files:
        handler.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": report}))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # not sys.exit: with collectives in flight the interpreter's end could wait for the other ranks
    logging.shutdown()
    os._exit(getattr(error, "exit_code", 1) if _is_users(error) else 1)


def _is_users(error: BaseException) -> bool:
    """Return whether a user can act on the error; the single-GPU model's file imports torch alone,
    so that its exception cannot be a UserError."""
    single_gpu = sys.modules.get("checkpoints_tools.single_gpu")
    of_model = single_gpu is not None and isinstance(error, single_gpu.ModelError)
    return of_model or isinstance(error, UserError)


FULL = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EIO: "look at the disk or the file system",
    errno.ESTALE: "look at the disk or the file system",
}
# What torch and the system's loader say when there is no memory, and Python of a thread
WITHOUT_MEMORY = (
    "not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory",
    "failed to map segment", "can't start new thread", "bad_alloc",
    "resource temporarily unavailable",
)  # fmt: skip


def _exhausted(error: BaseException) -> str | None:
    """What ran out or is in the way, and what to do, for errors that say so: disk, file size,
    files, memory; the file that an operation failed on."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error}; {FULL[error.errno]} and run the same command again"
    # torch and gloo say so in RuntimeErrors
    if any(words in text.lower() for words in ("too many open files", "init uv loop")):
        return f"{text}; raise ulimit -n, to 1024 or more, and run the same command again"
    if is_panic(error):
        return f"a library gave up over what it was given ({text}); look for a damaged file"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{text}; use a shorter name"
    if _without_memory(error):
        return f"{stop.NO_MEMORY} ({text})"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{text}; restore what belongs there, or check its path and permissions"
    return None


def _without_memory(error: BaseException) -> bool:
    """Whether memory, or a thread's stack, was refused."""
    if isinstance(error, OSError) and error.errno is not None:  # ctypes sets none
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, ImportError, OSError)) and any(
        words in str(error).lower() for words in WITHOUT_MEMORY
    )


def _flush_output() -> None:
    """Write what is printed; what is lost is an error here, and none at the interpreter's end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        error.strerror = f"standard output: {error.strerror}"
        raise


def _quiet_libraries() -> None:
    """Drop what the engines say on import and at every start; their errors still come through."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|deepspeed|torch)\.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if logging.lastResort is not None:  # commands that keep no log print their warnings by it
        logging.lastResort.setFormatter(LogFormatter())


@app.command(context_settings=WITH_OVERRIDES)
def pretrain(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file, e.g. configs/demo.toml.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build one rank of the job without memory; report.")
    ] = False,
    world_size: Annotated[
        int, typer.Option(min=1, max=bounds.TRACED_RANKS, help="Of the job, with --dry-run.")
    ] = 1,
    rank: Annotated[
        int, typer.Option(min=0, max=bounds.TRACED_RANKS - 1, help="Which one, with --dry-run.")
    ] = 0,
    gpus_per_node: Annotated[
        int, typer.Option(min=1, max=bounds.RANKS_PER_NODE, help="Ranks a node, with --dry-run.")
    ] = 8,
) -> None:
    """Train, or go on training. Fields are overridden by --section.field VALUE.

    One process by itself; the same command under torchrun or srun for many.
    """
    from pretrain.config import load_config
    from pretrain.open_files import raise_open_files

    stop.listen()
    if not dry_run:
        raise_open_files()
    loaded = load_config(config, context.args)
    if dry_run:
        loaded.data_parallel(world_size)
        from parallel.compat import prepare_host

        prepare_host()
        from pretrain.dry_run import dry_run as run

        run(loaded, world_size, rank, gpus_per_node)
        return
    # Neither torch nor DeepSpeed is imported before the configuration is known to be good
    from parallel.launch import launch_from_environment

    launch = launch_from_environment()
    loaded.data_parallel(launch.world_size)
    from parallel.compat import prepare_host

    prepare_host(launch.local_rank)  # before DeepSpeed looks for an accelerator
    from kernels.dispatch import check_environment

    check_environment()
    from pretrain.job import train

    if (reason := train(loaded, launch)) is not None:
        if launch.rank == 0:
            with contextlib.suppress(OSError):
                print(f"stopped, all saved ({reason}); run the same command again", file=sys.stderr)
        stop.exit_for_requeue()


@app.command(context_settings=WITH_OVERRIDES)
def preflight(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file.")],
) -> None:
    """Check and compare the nodes of a job, as its ranks. 86: bad ones are named.

    Fields are overridden by --section.field VALUE.
    """
    from parallel.launch import launch_from_environment
    from pretrain.config import load_config
    from pretrain.open_files import raise_open_files

    stop.listen()
    raise_open_files()
    loaded, launch = load_config(config, context.args), launch_from_environment()
    loaded.data_parallel(launch.world_size)
    from parallel.compat import prepare_host

    prepare_host(launch.local_rank)  # before DeepSpeed looks for an accelerator
    from slurm.preflight import run

    code = run(loaded, launch)
    sys.stderr.flush()
    os._exit(code)


@app.command("bad-nodes", context_settings=WITH_OVERRIDES, hidden=True)
def bad_nodes(context: typer.Context, config: Path) -> None:
    """Those that the run's preflight named, as Slurm lists nodes."""
    from pretrain.config import load_config
    from slurm.named_nodes import named_nodes

    say(",".join(named_nodes(Path(load_config(config, context.args).logging.run_dir))))


@app.command(context_settings=WITH_OVERRIDES)
def nodes(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file.")],
    of: Annotated[int, typer.Option(min=1, max=bounds.NODES, help="How many there are.")],
    tasks_per_node: Annotated[int, typer.Option(min=1, max=bounds.RANKS_PER_NODE)] = 8,
) -> None:
    """How many of the nodes granted to a job its layout can use.

    Fields are overridden by --section.field VALUE.
    """
    from pretrain.config import load_config

    print(load_config(config, context.args).usable_nodes(of, tasks_per_node))


@app.command(context_settings=WITH_OVERRIDES)
def estimate(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file.")],
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=bounds.NODES,
            help="Nodes of the job.",
            show_default="as many as one model replica needs",
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, max=bounds.RANKS_PER_NODE, help="GPUs of a node.", show_default="8"),
    ] = None,
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU, e.g. 80GiB.")] = "80GiB",
    gpu: Annotated[
        Literal["a100", "h100", "h200", "b200"], typer.Option(help="Whose peaks bound the time.")
    ] = "h100",
    search: Annotated[bool, typer.Option("--search", help="Rank the layouts that fit.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Parameters, FLOPs, memory, traffic and least time of a run. 2: it does not fit.

    Fields are overridden by --section.field VALUE.
    """
    from pretrain.config import load_config
    from pretrain.estimate import Job, one_replica, parse_memory
    from pretrain.estimate_report import run

    loaded = load_config(config, context.args)
    if nodes is None and gpus_per_node is None and not search:
        nodes, gpus_per_node = one_replica(loaded)
    job = Job(nodes or 1, gpus_per_node or 8, parse_memory(gpu_memory), gpu)
    run(loaded, job, search=search, as_json=json_output)


@app.command()
def prepare(
    inputs: Inputs,
    out: Annotated[
        str, typer.Option(help="New folder for train/ and validation/ shards, or a URL (s3://...).")
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


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of an exported model.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=bounds.LENGTH)] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, max=bounds.LARGEST, help="0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, max=bounds.VOCABULARY, help="Keep the k likeliest; 0: all.")
    ] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest of this total mass.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=bounds.SEED, help="Of the sampling.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue a prompt with an exported model, one process."""
    from pretrain.generate import run

    run(
        model,
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        json_output=json_output,
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[
        Path | None, typer.Option(help="The page.", show_default="RUN/report.html", callback=local)
    ] = None,
) -> None:
    """Write one HTML page of a run: curves across restarts, where time goes, events."""
    from pretrain.report import write_report

    say(str(write_report(run, out or run / "report.html")))


@kernels_app.command("audit")
def kernels_audit(
    target: Annotated[
        list[str] | None,
        typer.Option(help="sm_80, sm_90, sm_100 or gfx942, repeatable.", show_default="all"),
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Accept the numbers as golden.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all here.", callback=local)
    ] = None,
) -> None:
    """Compile every kernel without a GPU; report what the compiler made of it. 1: a rule broken."""
    from kernels.audit.command import audit
    from kernels.errors import KernelsError

    try:
        code = audit(target or [], update, json_file)
    except KernelsError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(code)


@kernels_app.command("launches", context_settings=WITH_OVERRIDES)
def kernels_launches(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file.")],
    layer: Annotated[
        Literal["ssd", "attention"] | None,
        typer.Option(help="One layer by its operations, and what the host does for it."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Accept the counts as golden.")] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="What the host launches with training.cuda_graphs.")
    ] = False,
) -> None:
    """Count what one training step asks of a GPU, without one: operations, bytes and waits.

    Fields are overridden by --section.field VALUE.
    """
    from kernels.target import interpreting
    from pretrain.config import ConfigError, load_config

    loaded = load_config(config, context.args)
    if update and context.args:
        raise ConfigError("--update accepts the counts of a file as it is; leave overrides out")
    if interpreting():
        raise ConfigError("TRITON_INTERPRET is set: unset it, so that launches are counted")
    # before torch and DeepSpeed look for a GPU: none is used
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    from pretrain.launches_report import run

    name = "" if context.args else config.name
    run(loaded, name, layer, as_json=json_output, update=update, graphs=graphs)


@kernels_app.command(
    "bench",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def kernels_bench(context: typer.Context) -> None:
    """Time the scan against attention and other scans; --help lists the options."""
    from benchmarks.kernels import main

    raise typer.Exit(main(context.args))


@kernels_app.command(
    "tune",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def kernels_tune(context: typer.Context) -> None:
    """Find the scan's fastest tile on this GPU, for TRANSXSSM_TILES; --help lists the options."""
    from kernels.ssd.tuning import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=WITH_OVERRIDES)
def doctor(
    context: typer.Context,
    layout: Annotated[
        Path | None, typer.Option(help="Instead, show which rank does what under this TOML file.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=4_096, help="Of the job, with --layout.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(min=1, max=bounds.RANKS_PER_NODE, help="Ranks a node, with --layout.")
    ] = 8,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Instead, compare fast paths with plain ones here.")
    ] = False,
) -> None:
    """Check this machine: versions, devices, name clashes, disk, memory, compilers, network.

    With --layout, fields are overridden by --section.field VALUE. --kernels runs what training
    checks at its start: kernels and products on the GPU against PyTorch. Without a GPU the kernels
    are interpreted, which takes about a minute.
    """
    if kernels and layout is not None:
        raise typer.BadParameter("--kernels and --layout exclude each other")
    if layout is not None:
        from pretrain.config import load_config
        from pretrain.layout import print_layout

        print_layout(load_config(layout, context.args), nodes, gpus_per_node)
        return
    if context.args:
        raise typer.BadParameter(f"{' '.join(context.args)}: overrides go with --layout")
    if kernels:
        from pretrain.kernel_check import run_here

        raise typer.Exit(run_here())
    from pretrain.doctor import doctor as run

    raise typer.Exit(run())


if __name__ == "__main__":
    main()
