"""`transxssm kernels ...`. Heavy imports happen inside the command that needs them."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from pretrain.console import local
from pretrain.overrides import WITH_OVERRIDES

kernels_app = typer.Typer(help="Audit, count, time and tune the kernels.", no_args_is_help=True)


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
    context_settings=WITH_OVERRIDES,
    add_help_option=False,
)
def kernels_bench(context: typer.Context) -> None:
    """Time the scan against attention and other scans; --help lists the options."""
    from benchmarks.kernels import main

    raise typer.Exit(main(context.args))


@kernels_app.command(
    "tune",
    context_settings=WITH_OVERRIDES,
    add_help_option=False,
)
def kernels_tune(context: typer.Context) -> None:
    """Find the scan's fastest tile on this GPU, for TRANSXSSM_TILES; --help lists the options."""
    from kernels.ssd.tuning import main

    raise typer.Exit(main(context.args))
