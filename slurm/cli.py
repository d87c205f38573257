"""The commands about jobs: submit, runs, status, logs, cancel. They parse and print."""

import codecs
import io
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table

from parallel import bounds
from pretrain.console import print_json, say, warn, whole_console
from untrusted.numbers import number
from untrusted.text import printable, printable_lines

if TYPE_CHECKING:
    from slurm.runs import RunStatus

Run = Annotated[Path, typer.Argument(help="A run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
WATCH_SECONDS = 2.0
LONGEST = 1e10  # seconds that are shown
LOG_BLOCK = 1 << 20  # bytes
MOST_JOBS = 4_000_000  # of an array, in Slurm
LARGEST_LOSS = 1e100  # that is drawn, as in reports
ENDED_WIDTH = 60  # letters of how a run ended, in the table of runs
BLOCKS = "▁▂▃▄▅▆▇█"


def submit(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file.")],
    nodes: Annotated[str, typer.Option(help="A number, or MIN-MAX with --elastic.")],
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    time: Annotated[str | None, typer.Option(help="Limit, as sbatch takes it.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, max=bounds.RANKS_PER_NODE, help="0: CPUs only.")
    ] = None,
    tasks_per_node: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=bounds.RANKS_PER_NODE,
            help="Processes of a node.",
            show_default="as many as GPUs, or 1",
        ),
    ] = None,
    constraint: Annotated[str | None, typer.Option()] = None,
    exclude: Annotated[str, typer.Option(help="Nodes not to use.")] = "",
    array: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_JOBS, help="Jobs one after the other, where requeueing is not allowed."
        ),
    ] = 0,
    after: Annotated[str, typer.Option(help="A job to wait for, however it ends.")] = "",
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Let data parallelism follow the nodes granted.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script.")] = False,
) -> None:
    """Check a run against the nodes asked for, make its directory and submit it to Slurm.

    Defaults come from cluster.toml (see docs/slurm.md); fields are overridden by
    --section.field VALUE.
    """
    from pretrain.config import load_config
    from slurm.cluster import load_cluster
    from slurm.script import Request, job_script
    from slurm.submit import NODE_LOCAL, check, missing_paths
    from slurm.submit import submit as run

    loaded, cluster = load_config(config, context.args), load_cluster()
    gpus = cluster.gpus_per_node if gpus_per_node is None else gpus_per_node
    request = Request(
        nodes=nodes,
        tasks_per_node=tasks_per_node or gpus or 1,
        partition=cluster.partition if partition is None else partition,
        account=cluster.account if account is None else account,
        qos=cluster.qos if qos is None else qos,
        constraint=cluster.constraint if constraint is None else constraint,
        time=cluster.time if time is None else time,
        gpus_per_node=gpus,
        cpus_per_task=cluster.cpus_per_task,
        exclude=exclude,
        after=after,
        array=array,
        elastic=elastic,
    )
    check(loaded, request, cluster)
    run_dir = Path(loaded.logging.run_dir).resolve()
    if request.most_nodes > 1 and str(run_dir).startswith(NODE_LOCAL):
        _warn(f"{run_dir} lies where nodes have disks of their own")
    if dry_run:
        for missing in missing_paths(loaded):
            _warn(missing)
        print(job_script(request, cluster, run_dir), end="")
        return
    job_id = run(loaded, request, cluster)
    say(f"job {job_id}: {run_dir / 'job.sbatch'}")
    for word in ("status", "logs -f", "cancel"):
        say(f"  transxssm {word} {shlex.quote(loaded.logging.run_dir)}")


def runs(
    folder: Annotated[Path, typer.Argument(help="Where run directories are.")] = Path("runs"),
    json_output: Json = False,
) -> None:
    """List runs: state, step, loss, speed, starts, time left."""
    from slurm.jobs import known_jobs
    from slurm.runs import find_runs, run_status

    run_dirs = find_runs(folder)
    if not run_dirs:
        _warn(f"{folder}: there is no run in it, neither submitted nor begun")
    jobs, found = known_jobs(), []
    table = Table(
        "run", "job", "state", "step", "loss", "tokens/s", "starts", "left", "limit", "ended"
    )
    for run_dir in run_dirs:
        try:
            status = run_status(run_dir, jobs)
            row = _row(status)
        except Exception as error:  # whatever is wrong with one run must not hide the others
            _warn(f"{run_dir} is left out: {error}")
        else:
            found.append(status)
            table.add_row(*row)
            _warn(*status.damaged)
    if json_output:
        print_json([asdict(status) for status in found])
        return
    whole_console().print(table)


def _row(status: "RunStatus") -> list[str]:
    """Cells of a run, in the table of runs."""
    cells = (
        status.run_dir, status.job_id or "", status.state,
        f"{number(status.step)} of {_total_steps(status)}",
        "" if status.loss is None else number(status.loss, 5),
        "" if status.tokens_per_second is None else number(status.tokens_per_second),
        number(status.starts), _duration(status.seconds_left), status.job_time_left,
        shorten(status.ended or "", ENDED_WIDTH),
    )  # fmt: skip
    return [printable(cell) for cell in cells]


def _total_steps(status: "RunStatus") -> str:
    """A later start may be configured for fewer steps than the run has made."""
    fewer = status.step > status.total_steps
    return f"{number(status.total_steps)}{' (now configured)' if fewer else ''}"


def _warn(*sentences: str) -> None:
    for sentence in sentences:
        warn(sentence)


def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it.")] = False,
    json_output: Json = False,
) -> None:
    """How a run is doing."""
    from slurm.runs import OVER, run_status

    if json_output:
        print_json(asdict(run_status(run)))
        return
    console = whole_console()
    if not watch:
        console.print(_status_table(run_status(run)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = run_status(run)
            live.update(_status_table(found), refresh=True)
            if found.state in OVER:
                return
            time.sleep(WATCH_SECONDS)


def _status_table(found: "RunStatus") -> Table:
    table = Table("name", "value", show_header=False, box=None)
    rate = found.tokens_per_second
    fields = asdict(found) | {
        "starts": number(found.starts),
        "step": number(found.step),
        "total_steps": _total_steps(found),
        "loss": number(found.loss, 5),
        "tokens_per_second": "" if rate is None else number(rate),
        "skipped_updates": number(found.skipped_updates),
        "rollbacks": number(found.rollbacks),
        "seconds_left": _duration(found.seconds_left),
        "recent_losses": _sparkline(found.recent_losses),
        "damaged": "\n".join(found.damaged),
    }
    for name, value in fields.items():
        if value not in (None, ""):
            table.add_row(
                name.replace("seconds_left", "left").replace("_", " "), printable_lines(str(value))
            )
    return table


def _sparkline(values: list[float]) -> str:
    """The course of the losses, highest to lowest, in blocks; without those too large to draw."""
    values = [value for value in values if abs(value) < LARGEST_LOSS]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span, top = (high - low) or 1.0, len(BLOCKS) - 1
    return "".join(BLOCKS[round((value - low) / span * top)] for value in values)


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Print this rank's log instead.")] = None,
) -> None:
    """Print the log of the run's newest job or, without Slurm, of rank 0.

    --rank N prints the log of another rank.
    """
    from pretrain.config import ConfigError
    from slurm.runs import newest_log
    from untrusted.files import open_regular

    def blocks(file: IO[bytes], begin: int, path: Path) -> Iterator[bytes]:
        try:
            file.seek(begin)
            while block := file.read(LOG_BLOCK):
                yield block
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}); look at the file and its file system"
            ) from error

    path, at, decoder = newest_log(run, rank), 0, _decoder()
    while True:
        with open_regular(path, follow_link=True) as file:
            for block in blocks(file, at, path):
                text = printable_lines(decoder.decode(block))
                sys.stdout.buffer.write(text.encode())
                at += len(block)
            sys.stdout.flush()
        if not follow:
            return
        time.sleep(0.5)
        if (latest := newest_log(run, rank)) != path:
            path, at, decoder = latest, 0, _decoder()


def _decoder() -> io.IncrementalNewlineDecoder:
    """Of bytes that may not be UTF-8, with any line ends; keeps a letter that is not whole yet."""
    return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), True)


def cancel(run: Run) -> None:
    """Cancel a run's jobs. What is saved stays; `submit` goes on from it."""
    from pretrain.config import ConfigError
    from pretrain.run_dir import check_run
    from slurm.jobs import JOBS, JobLog, active_jobs, slurm

    if not (run / JOBS).exists():
        check_run(run)
    record, jobs = JobLog(run), active_jobs()
    _warn(*record.faults)
    found = [job_id for job_id in record.job_ids if job_id in jobs]
    if not found:
        raise ConfigError(f"{run}: no job of it waits or runs")
    slurm("scancel", *found)
    say(f"cancelled {', '.join(found)}")


def _duration(seconds: float | None) -> str:
    """Of what is left: from 0 to centuries."""
    if seconds is None:
        return ""
    return "centuries" if seconds > LONGEST else str(timedelta(seconds=round(max(0.0, seconds))))
