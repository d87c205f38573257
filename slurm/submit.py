"""`transxssm submit`: a configuration and a request, checked, as a job script in the run directory.

The script is slurm/pretrain.sbatch with the request's #SBATCH lines and the run's configuration
written into it: it can be read, changed and submitted again by hand. What may be secret travels in
the environment of sbatch, which Slurm hands to the job and to each of its starts: the variables of
cluster.toml, and credentials in the URLs of the configuration.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from parallel import bounds
from pretrain.config import Config, ConfigError
from pretrain.console import shown
from pretrain.credentials import check_credentials, dump_recorded, environment_of_job
from pretrain.estimate import Job, estimate, parse_memory
from pretrain.estimate_report import check_fits
from pretrain.run_lock import refuse_held
from slurm.cluster import ClusterConfig
from slurm.jobs import WAITING_OR_RUNNING, JobLog, active_jobs, read_job_id, slurm
from slurm.script import Request, check_values, job_script
from untrusted.files import write_durably

NODE_LOCAL = ("/tmp/", "/dev/shm/", "/var/tmp/")


def check(config: Config, request: Request, cluster: ClusterConfig) -> None:
    """Raises ConfigError for what cannot run anywhere, naming the field or option, and SlurmError
    for what a job script cannot hold."""
    check_values(request, cluster, config.logging.run_dir)
    if not re.fullmatch(r"[1-9][0-9]{0,8}(-[1-9][0-9]{0,8})?", request.nodes):
        raise ConfigError(f"--nodes {request.nodes}: write a number, or MIN-MAX with --elastic")
    if request.most_nodes > bounds.NODES:
        raise ConfigError(f"--nodes {request.nodes}: no more than {bounds.NODES:,} can be used")
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
    match = re.fullmatch(
        r"(?:([0-9]{1,6})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?", text
    )
    if match is None:
        raise ConfigError(f"--time {text}: write minutes, hours:minutes:seconds or days-hours")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1]:
        return float(86400 * days + 3600 * first + 60 * second + third)
    if match[4]:
        return float(3600 * first + 60 * second + third)
    return float(60 * first + second)


def submit(config: Config, request: Request, cluster: ClusterConfig) -> str:
    """Make the run directory and submit; the job's id. Raises ConfigError or SlurmError."""
    if missing := missing_paths(config):
        raise ConfigError("; ".join(missing))
    check_credentials(config)
    run_dir = Path(config.logging.run_dir).resolve()
    record, jobs = JobLog(run_dir), active_jobs()
    for fault in record.faults:
        print(f"warning: {shown(fault)}", file=sys.stderr)
    for job_id in record.job_ids:
        if jobs.get(job_id, {}).get("state") in WAITING_OR_RUNNING and job_id != request.after:
            raise ConfigError(
                f"logging.run_dir {run_dir} is that of job {job_id}, which is "
                f"{jobs[job_id]['state'].lower()}; wait for it, "
                f"`transxssm cancel {shlex.quote(str(run_dir))}`, "
                f"continue it with --after {job_id}, or choose another"
            )
    refuse_held(run_dir, except_job=request.after)
    script = job_script(request, cluster, run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_durably(run_dir / "config.toml", dump_recorded(config).encode())
        write_durably(run_dir / "job.sbatch", script.encode(), 0o600)
        record.check_writable()
    except OSError as error:
        raise ConfigError(f"logging.run_dir={run_dir} cannot be written ({error})") from error
    environment = cluster.environment | os.environ | environment_of_job(config)
    answer = slurm("sbatch", "--parsable", str(run_dir / "job.sbatch"), environment=environment)
    job_id = read_job_id(answer)
    record.add(job_id)
    return job_id
