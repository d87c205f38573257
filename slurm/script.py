"""The job script of a submission: slurm/pretrain.sbatch with the request's #SBATCH lines in it.

Every value is data. Slurm splits a #SBATCH line at blanks, ends it at "#" and removes quotes and
backslashes, also between quotes; bash runs every line that follows. So control characters are
refused, values with a grammar of Slurm's own must follow it, and the rest is quoted.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.cluster import ClusterConfig
from slurm.jobs import SlurmError
from untrusted.text import printable

SCRIPT = Path(__file__).with_name("pretrain.sbatch")
OWN_LINES = "#SBATCH"
MAX_VALUE_BYTES = 4096  # Slurm copies an option into a buffer of 8,192 bytes
UNQUOTED = re.compile(r"[A-Za-z0-9_./:=,@%+&|*()\[\]-]+")

NAMES = r"[A-Za-z0-9_.@+:-]+(,[A-Za-z0-9_.@+:-]+)*"
GRAMMAR = {
    "partition": (NAMES, "names of letters, digits, _ . @ + : and -, separated by commas"),
    "account": (NAMES, "a name of letters, digits, _ . @ + : and -"),
    "qos": (NAMES, "a name of letters, digits, _ . @ + : and -"),
    "constraint": (
        r"[A-Za-z0-9_.@+:=!&|,*()\[\]-]+",
        "features joined by & and |, without blanks, such as 'a100&ib'",
    ),
    "exclude": (r"[A-Za-z0-9_.,\[\]-]+", "a list of nodes such as node[1-4],node9"),
    "after": (r"[0-9]+(_[0-9]+)?", "the number of one job"),
}
SBATCH_OPTION = r"--[a-z][a-z0-9-]*(=.*)?"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"


@dataclass(frozen=True)
class Request:
    """What a job asks of Slurm. Empty and 0: nothing."""

    nodes: str
    """A number, or MIN-MAX with `elastic`."""
    tasks_per_node: int
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = ""
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    exclude: str = ""
    after: str = ""
    """A job that has to end first, however it ends."""
    array: int = 0
    """Jobs one after the other, each going on where the one before ended, instead of requeueing."""
    elastic: bool = False

    @property
    def most_nodes(self) -> int:
        """That Slurm may grant."""
        return int(self.nodes.rpartition("-")[2])

    @property
    def fewest_nodes(self) -> int:
        """That Slurm may grant."""
        return int(self.nodes.partition("-")[0])


def check_values(request: Request, cluster: ClusterConfig, run_dir: str) -> None:
    """Refuse what a job script or a line of Slurm's cannot hold. Raises SlurmError.

    run_dir: logging.run_dir as configured.
    """
    _check_folder("logging.run_dir", run_dir)
    try:
        _check_folder("the working directory", str(Path.cwd()))
    except FileNotFoundError as error:
        raise SlurmError("the working directory has been removed; change to another") from error
    for field in ("nodes", "time"):  # `check` knows their grammar
        _check_text(f"--{field}", getattr(request, field))
    for field, (grammar, form) in GRAMMAR.items():
        if value := getattr(request, field):
            _check_text(f"--{field}", value)
            if not re.fullmatch(grammar, value):
                raise SlurmError(
                    f"--{field} {value!r} is nothing that Slurm can read; write {form} (see also "
                    "cluster.toml)"
                )
    for option in cluster.sbatch:
        _check_text("cluster.toml sbatch", option)
        if not re.fullmatch(SBATCH_OPTION, option):
            raise SlurmError(
                f"cluster.toml sbatch: {option!r} is not one option of sbatch; write each by "
                "itself, as --name or --name=value"
            )
    for name, value in cluster.environment.items():
        if not re.fullmatch(VARIABLE, name):
            raise SlurmError(
                f"cluster.toml [environment]: {printable(name)!r} cannot be the name of a "
                "variable; use letters, digits and _, and no digit first"
            )
        if name.startswith("SBATCH_"):  # of which sbatch would make options
            raise SlurmError(
                f"cluster.toml [environment]: {name} would change how the job is submitted; name "
                "the option in cluster.toml's sbatch, as --name=value"
            )
        _check_text(f"cluster.toml [environment] {name}", value, show=False, bounded=False)


def _check_folder(field: str, path: str) -> None:
    _check_text(field, path)
    if "\\" in path:
        raise SlurmError(
            f"{field} {path!r} has a backslash, after which Slurm does not put the job's number "
            "into the name of its log; choose a path without one"
        )


def _check_text(field: str, value: str, *, show: bool = True, bounded: bool = True) -> None:
    """Refuse control characters and, if `bounded`, what is too long; show: name the value."""
    named = f"{field} '{printable(value)[:200]}'" if show else field
    if printable(value) != value:
        raise SlurmError(
            f"{named} has a control character, such as a line end, which would break the job "
            "script; remove it"
        )
    if bounded and len(value.encode()) > MAX_VALUE_BYTES:
        raise SlurmError(
            f"{named} is longer than the {MAX_VALUE_BYTES:,} bytes that Slurm takes; shorten it"
        )


def job_script(request: Request, cluster: ClusterConfig, run_dir: Path) -> str:
    """slurm/pretrain.sbatch for this request and the configuration in the run directory.

    The values of cluster.toml's [environment] are not in it: they may be secrets. Raises
    SlurmError.
    """
    check_values(request, cluster, str(run_dir))
    source = SCRIPT.read_text(encoding="utf-8").splitlines()
    last = max(n for n, line in enumerate(source) if line.startswith(OWN_LINES))
    own = [line for line in source[: last + 1] if line.startswith(OWN_LINES)]
    kept = [line for line in own if "--output" not in line and "--job-name" not in line]
    program = shutil.which("transxssm", path=str(Path(sys.executable).parent)) or "transxssm"
    exported = {"TRANSXSSM": program}
    exported |= {"TRANSXSSM_ELASTIC": "1"} if request.elastic else {}
    exported |= {"TRANSXSSM_MAX_REQUEUES": "0"} if request.array else {}
    lines = ["#!/bin/bash", f"# Made by `transxssm submit` from {SCRIPT.name}; to submit it again:"]
    lines += [f"#   sbatch {shlex.quote(str(run_dir / 'job.sbatch'))}"]
    lines += [f"{OWN_LINES} {sbatch_word(option)}" for option in _options(request, run_dir)]
    lines += [f"{OWN_LINES} {sbatch_word(option)}" for option in cluster.sbatch] + kept
    lines += [f"set -- {shlex.quote(str(run_dir / 'config.toml'))}"]
    # what the shell that submits exports goes before
    lines += [f"export {name}=${{{name}:-{shlex.quote(v)}}}" for name, v in exported.items()]
    lines += _reminders(cluster.environment)
    return "\n".join(lines + source[last + 1 :]) + "\n"


def _options(request: Request, run_dir: Path) -> Iterable[str]:
    log = "job-%A.log" if request.array else "job-%j.log"
    yield f"--job-name={run_dir.name}"
    yield f"--output={str(run_dir).replace('%', '%%')}/{log}"
    yield f"--chdir={Path.cwd()}"
    yield f"--nodes={request.nodes}"
    yield f"--ntasks-per-node={request.tasks_per_node}"
    for name in ("partition", "account", "qos", "constraint", "time", "exclude", "gpus_per_node",
                 "cpus_per_task"):  # fmt: skip
        if value := getattr(request, name):
            yield f"--{name.replace('_', '-')}={value}"
    if request.after:
        yield f"--dependency=afterany:{request.after}"
    if request.array:
        yield f"--array=1-{request.array}%1"


def sbatch_word(option: str) -> str:
    """Return an option as one word of a #SBATCH line."""
    if UNQUOTED.fullmatch(option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _reminders(environment: Mapping[str, str]) -> list[str]:
    """Lines that report variables of cluster.toml which a submission by hand has left out."""
    if not environment:
        return []
    return [
        f"for transxssm_name in {' '.join(environment)}; do",
        "    [[ -v $transxssm_name ]] ||",
        '        echo "== $transxssm_name of cluster.toml is not set: export it before sbatch"',
        "done",
    ]
