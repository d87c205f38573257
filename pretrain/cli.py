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

from parallel import bounds
from pretrain import data_cli, stop
from pretrain.checkpoint_cli import checkpoint_app
from pretrain.console import LogFormatter, local, say, shown
from pretrain.evaluation import cli as evaluation_command
from pretrain.kernels_cli import kernels_app
from pretrain.overrides import WITH_OVERRIDES
from slurm import cli as job_commands
from untrusted.errors import UserError, is_panic
from untrusted.secrets import remember

app = typer.Typer(
    name="transxssm",
    help="Pretrain TransXSSM, a hybrid of attention and state-space layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_cli.tokenizer_app, name="tokenizer")
app.add_typer(data_cli.data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(kernels_app, name="kernels")

app.command(context_settings=WITH_OVERRIDES)(job_commands.submit)
for command in (job_commands.runs, job_commands.status, job_commands.logs, job_commands.cancel):
    app.command()(command)
app.command()(data_cli.prepare)
app.command()(evaluation_command.evaluate)

REPORT_IT = "This is a fault of transxssm itself: please report it, with the lines above."
SECONDS_TO_CAUSE = 8.0  # until another rank has said why it broke the collectives of this one


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
