"""What happens to jobs of weeks, on a real Slurm of four nodes in namespaces of this host.

    python -m benchmarks.slurm_campaign [--quick] [--nodes 2] [--folder runs/slurm_campaign]
        [--section.field VALUE ...]

Every case trains the same small model, one task a node, in the layout that the given fields of its
configuration make, and does something to it: its time ends, again and again; a node is powered off,
or its network cut, in the middle of training or of a save; a rank is stopped. The job has to come
back by itself and to end with the losses of a run that nothing happened to, digit for digit. Beside
the seconds until it trains again stand those until Slurm alone has a job that only sleeps running
again, on the same settings (SlurmdTimeout 5 s).

Cases that have ended are remembered in the folder: run it again after a kill, and with other nodes
or fields in another folder. Exits with 1 when a case does not end as it should.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.slurm_cluster import Cluster, why_not
from benchmarks.slurm_training import TrainingJob, curve
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from pretrain.config import Config, dump_config, load_config, parse_config

STEPS, STEP_SECONDS, SAVE_SECONDS = 60, 0.3, 4.0
ACTS_AT = 12
QUICK = ("power off, training",)


def configuration(data: Path) -> Config:
    """A small model; a checkpoint every 10 steps."""
    return parse_config(
        {
            "model": {
                "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_layers": 4,
                "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "state_dim": 16,
                "ssd_groups": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
            },
            "data": {
                "train": str(data / "train"), "validation": str(data / "validation"), "seq_len": 64,
            },
            "training": {
                "steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "dtype": "fp32",
                "eval_every": 20, "eval_batches": 1, "hang_timeout": 8, "stop_before_limit": 200,
            },
            "checkpoint": {"every": 10},
            "logging": {"tensorboard": False},
        }
    )  # fmt: skip


def process_of(job: TrainingJob, rank: int) -> int:
    """The pid, on this host, of a rank's training."""
    wanted = {f"SLURM_JOB_ID={job.id}", f"SLURM_PROCID={rank}"}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = set((folder / "environ").read_bytes().decode().split("\0"))
        except (OSError, UnicodeDecodeError):
            continue
        if b"benchmarks.slurm_training" in words and wanted <= environment:
            return int(folder.name)
    raise LookupError(f"no process of rank {rank} of job {job.id}")


def in_save(job: TrainingJob) -> bool:
    """Whether a checkpoint is being written."""
    return any((job.run_dir / "checkpoints").glob("step-*.tmp"))


def at_step(job: TrainingJob) -> bool:
    """Whether enough is done to be interrupted."""
    return job.step >= ACTS_AT


def power_off(cluster: Cluster, job: TrainingJob) -> Callable[[], None]:
    """Of the job's last node; returns what mends it."""
    node = job.nodes[-1]
    cluster.power_off(node)
    return lambda: cluster.power_on(node)


def cut(cluster: Cluster, job: TrainingJob) -> Callable[[], None]:
    """The network of the job's last node."""
    node = job.nodes[-1]
    cluster.cut(node)
    return lambda: cluster.mend(node)


def stop_rank(_: Cluster, job: TrainingJob) -> Callable[[], None]:
    """With SIGSTOP, the second rank."""
    os.kill(process_of(job, 1), signal.SIGSTOP)
    return lambda: None


CASES: dict[str, tuple[Callable[[TrainingJob], bool], Any]] = {
    "power off, training": (at_step, power_off),
    "power off, save": (in_save, power_off),
    "network cut, training": (at_step, cut),
    "network cut, save": (in_save, cut),
    "SIGSTOP of a rank": (at_step, stop_rank),
}


def run_case(
    cluster: Cluster, name: str, nodes: int, config: Path, run_dir: Path
) -> tuple[TrainingJob, float]:
    """The job when it has ended, and the seconds until it trained again."""
    come, act = CASES[name]
    save = SAVE_SECONDS if come is in_save else 0.0
    job = TrainingJob(cluster, config, run_dir, nodes=nodes, step=STEP_SECONDS, save=save)
    job.until(lambda: come(job))
    mend = act(cluster, job)
    begin, log = time.monotonic(), len(job.log)
    try:
        job.until(lambda: job.starts > 1 and "\nstep " in job.log[log:], timeout=180)
        seconds = time.monotonic() - begin
        job.wait()
    finally:
        mend()
        cluster.wait_for_nodes()
    return job, seconds


def run_chain(
    cluster: Cluster, nodes: int, config: Path, run_dir: Path
) -> tuple[TrainingJob, float]:
    """A job whose time ends before its run does, until that has ended."""
    job = TrainingJob(cluster, config, run_dir, nodes=nodes, step=2.0, options=("--time=4",))
    job.wait(timeout=1200)
    return job, float("nan")


def floor(cluster: Cluster) -> float:
    """Seconds from a power-off until Slurm alone has a job running again."""
    job = cluster.sbatch("--nodes=2", "--requeue", "--wrap", "srun sleep 300")
    cluster.wait(job, ["RUNNING"])
    time.sleep(2)
    names = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout
    node = int(names.split()[-1].removeprefix("node"))
    cluster.power_off(node)
    begin = time.monotonic()
    while cluster.job(job)["Restarts"] == "0" or cluster.job(job)["JobState"] != "RUNNING":
        time.sleep(0.1)
    seconds = time.monotonic() - begin
    cluster.run("scancel", job)
    cluster.power_on(node)
    cluster.wait_for_nodes()
    return seconds


def main(arguments: list[str]) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.slurm_campaign")
    parser.add_argument("--quick", action="store_true", help="one case")
    parser.add_argument("--folder", type=Path, default=Path("runs/slurm_campaign"))
    parser.add_argument("--nodes", type=int, default=2, choices=(2, 3, 4))
    options, overrides = parser.parse_known_args(arguments)
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 1
    folder: Path = options.folder.resolve()
    if options.quick:
        folder = Path(tempfile.mkdtemp(prefix="slurm_campaign"))
    folder.mkdir(parents=True, exist_ok=True)
    remembered = folder / "results.json"
    found: dict[str, Any] = json.loads(remembered.read_text()) if remembered.exists() else {}
    if not (folder / "config.toml").exists():
        text = sorted((Path(__file__).parents[1] / "data_pipeline").glob("*.py"))
        train_tokenizer(text, folder / "tokenizer", 512)
        prepare(text, folder / "tokenizer", folder / "data", 64, validation_fraction=0.1)
        base = folder / "base.toml"
        base.write_text(dump_config(configuration(folder / "data")))
        config = dump_config(load_config(base, overrides))
        ends = run_command(
            "pretrain", base, *overrides, f"--logging.run_dir={folder / 'whole'}",
            ranks=options.nodes, kill_after=600,
        )  # fmt: skip
        assert not any(end.code for end in ends), ends[0].output
        (folder / "config.toml").write_text(config)
    cluster = Cluster()
    try:
        if "floor" not in found:
            found["floor"] = floor(cluster)
        names = QUICK if options.quick else (*CASES, "time ends again and again")
        for name in names:
            if name in found:
                continue
            run_dir = folder / f"{name.replace(' ', '-').replace(',', '')}-{os.getpid()}"
            print(f"{name} ...", file=sys.stderr)
            chain = name not in CASES
            job, seconds = (
                run_chain(cluster, options.nodes, folder / "config.toml", run_dir)
                if chain
                else run_case(cluster, name, options.nodes, folder / "config.toml", run_dir)
            )
            same = curve(run_dir) == curve(folder / "whole")
            state, starts = job.field("JobState"), job.starts
            met = state == "COMPLETED" and same and starts >= (4 if chain else 2)
            found[name] = [state, starts, seconds, same, met]
            remembered.write_text(json.dumps(found))
    finally:
        cluster.stop()
    table = Table("what happens", "state", "starts", "trains again after", "losses", "")
    for name in names:
        state, starts, seconds, same, met = found[name]
        table.add_row(
            name, state, str(starts), "" if seconds != seconds else f"{seconds:.1f} s",
            "the same" if same else "DIFFER", "met" if met else "MISSED",
        )  # fmt: skip
    console = Console(highlight=False, width=110)
    console.print(table)
    console.print(f"Slurm alone has a job running again {found['floor']:.1f} s after a power-off")
    missed = [name for name in names if not found[name][-1]]
    console.print(f"{len(names) - len(missed)} of {len(names)} cases met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
