"""`transxssm submit`: a configuration and a request, checked, as a job script in the run directory.

The script is slurm/pretrain.sbatch with the request's #SBATCH lines and the run's configuration
written into it: it can be read, changed and submitted again by hand.
"""

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import Config, ConfigError, dump_config
from pretrain.estimate import Job, estimate, parse_memory
from pretrain.estimate_report import check_fits
from slurm.cluster import ClusterConfig
from slurm.jobs import WAITING_OR_RUNNING, active_jobs, job_ids, remember, slurm

SCRIPT = Path(__file__).with_name("pretrain.sbatch")
OWN_LINES = "#SBATCH"
NODE_LOCAL = ("/tmp/", "/dev/shm/", "/var/tmp/")


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


def check(config: Config, request: Request, cluster: ClusterConfig) -> None:
    """Raises ConfigError for what cannot run anywhere, naming the field or option."""
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", request.nodes):
        raise ConfigError(f"--nodes {request.nodes}: write a number, or MIN-MAX with --elastic")
    if request.fewest_nodes > request.most_nodes:
        raise ConfigError(f"--nodes {request.nodes}: the first number is the smaller one")
    if "-" in request.nodes and not request.elastic:
        raise ConfigError(
            f"--nodes {request.nodes} leaves the number to Slurm, and only --elastic lets the "
            "layout follow it; add that, or ask for one number of nodes"
        )
    used = request.most_nodes
    if request.elastic:
        config.usable_nodes(request.fewest_nodes, request.tasks_per_node)
        used = config.usable_nodes(request.most_nodes, request.tasks_per_node)
    config.data_parallel(used * request.tasks_per_node)
    if request.gpus_per_node:
        job = Job(used, request.gpus_per_node, parse_memory(cluster.gpu_memory), "h100")
        check_fits(estimate(config, job), job)
    _check_time(config, request)


def missing_paths(config: Config) -> list[str]:
    """What the run would not find, seen from here."""
    named = {"data.train": config.data.train, "data.validation": config.data.validation}
    named |= {f"data.sources {source.name}": source.path for source in config.data.sources}
    if config.checkpoint.resume not in ("auto", "none"):
        named["checkpoint.resume"] = config.checkpoint.resume
    named["checkpoint.load_weights_only"] = config.checkpoint.load_weights_only
    return [
        f"{field}={path}: nothing is there, seen from {Path.cwd()}"
        for field, path in named.items()
        if isinstance(path, str) and path and "://" not in path and not Path(path).exists()
    ]


def _check_time(config: Config, request: Request) -> None:
    limit = seconds(request.time)
    margin = config.training.stop_before_limit
    if limit is None:
        return
    if limit <= margin:
        raise ConfigError(
            f"--time {request.time} leaves nothing before training.stop_before_limit={margin:g} s; "
            "ask for more, or lower the latter"
        )
    if not margin and not config.checkpoint.every:
        raise ConfigError(
            "with training.stop_before_limit=0 and checkpoint.every=0 a job whose time ends may "
            "save nothing; set one of them"
        )


def seconds(text: str) -> float | None:
    """Of sbatch's minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]];
    None for no limit. Raises ConfigError."""
    if text in ("", "0", "UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--time {text}: write minutes, hours:minutes:seconds or days-hours")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1]:
        return float(86400 * days + 3600 * first + 60 * second + third)
    if match[4]:
        return float(3600 * first + 60 * second + third)
    return float(60 * first + second)


def job_script(request: Request, cluster: ClusterConfig, run_dir: Path) -> str:
    """slurm/pretrain.sbatch for this request and the configuration in the run directory."""
    source = SCRIPT.read_text().splitlines()
    last = max(n for n, line in enumerate(source) if line.startswith(OWN_LINES))
    own = [line for line in source[: last + 1] if line.startswith(OWN_LINES)]
    kept = [line for line in own if "--output" not in line and "--job-name" not in line]
    output = run_dir / ("job-%A.log" if request.array else "job-%j.log")
    options = [f"--job-name={run_dir.name}", f"--output={output}", f"--chdir={Path.cwd()}"]
    options += [f"--nodes={request.nodes}", f"--ntasks-per-node={request.tasks_per_node}"]
    for name in ("partition", "account", "qos", "constraint", "time", "exclude", "gpus_per_node",
                 "cpus_per_task"):  # fmt: skip
        if value := getattr(request, name):
            options.append(f"--{name.replace('_', '-')}={value}")
    options += [f"--dependency=afterany:{request.after}"] if request.after else []
    options += [f"--array=1-{request.array}%1"] if request.array else []
    program = shutil.which("transxssm", path=str(Path(sys.executable).parent)) or "transxssm"
    exported = {"TRANSXSSM": program, **cluster.environment}
    exported |= {"TRANSXSSM_ELASTIC": "1"} if request.elastic else {}
    exported |= {"TRANSXSSM_MAX_REQUEUES": "0"} if request.array else {}
    lines = ["#!/bin/bash", f"# Made by `transxssm submit` from {SCRIPT.name}; to submit it again:"]
    lines += [f"#   sbatch {run_dir / 'job.sbatch'}"]
    lines += [f"#SBATCH {option}" for option in [*options, *cluster.sbatch]] + kept
    lines += [f"set -- {shlex.quote(str(run_dir / 'config.toml'))}"]
    # what the shell that submits exports goes before
    lines += [
        f"export {name}=${{{name}:-{shlex.quote(value)}}}" for name, value in exported.items()
    ]
    return "\n".join(lines + source[last + 1 :]) + "\n"


def submit(config: Config, request: Request, cluster: ClusterConfig) -> str:
    """Make the run directory and submit; the job's id. Raises ConfigError or SlurmError."""
    if missing := missing_paths(config):
        raise ConfigError("; ".join(missing))
    run_dir = Path(config.logging.run_dir).resolve()
    jobs = active_jobs()
    for job_id in job_ids(run_dir):
        if jobs.get(job_id, {}).get("state") in WAITING_OR_RUNNING and job_id != request.after:
            raise ConfigError(
                f"logging.run_dir {run_dir} is that of job {job_id}, which is "
                f"{jobs[job_id]['state'].lower()}; wait for it, `transxssm cancel {run_dir}`, "
                f"continue it with --after {job_id}, or choose another"
            )
    script = job_script(request, cluster, run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.toml").write_text(dump_config(config))
        (run_dir / "job.sbatch").write_text(script)
    except OSError as error:
        raise ConfigError(f"logging.run_dir={run_dir} cannot be written ({error})") from error
    words = slurm("sbatch", "--parsable", str(run_dir / "job.sbatch"))
    job_id = words.strip().split(";")[0]
    remember(run_dir, job_id)
    return job_id
