"""Faults met by jobs on a real Slurm: each ends as designed, within seconds, with one cause."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.slurm_cluster import Cluster
from tests.pretrain.command import read_metrics, write_config

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "pretrain", "parallel", "kernels", "data_pipeline", "checkpoints_tools", "slurm", "untrusted",
)  # fmt: skip
SECONDS = 60  # of a job, on a machine that runs two at a time


@dataclass
class Job:
    """Of a fault: how it is brought about, and what must come of it."""

    name: str
    state: str
    says: str
    setup: str = ""
    """Shell, in every task, before the command."""
    preflight: bool = False
    id: str = ""


def jobs(folder: Path) -> list[Job]:
    edited = folder / "edited"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, edited / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (edited / "kernels/checks.py").open("a") as file:
        file.write("# edited\n")
    full = folder / "full disk/run/checkpoints"
    return [
        Job("nan", "COMPLETED", "update skipped at step 3: loss nan"),
        Job("spike", "COMPLETED", "update skipped at step 11: "),
        Job("corrupt shard", "FAILED", "shard.00000"),
        Job("unreadable tokenizer", "FAILED", "tokenizer.json: not the tokenizer"),
        Job("full disk", "FAILED", "No space left on device",
            setup=f'mkdir -p "{full}"; mount -t tmpfs -o size=256k tmpfs "{full}"'),
        Job("different code", "FAILED", "different installations: ", preflight=True,
            setup=f'[[ $(hostname) == node[13] ]] || cd "{edited}"; export PYTHONPATH=$PWD'),
    ]  # fmt: skip


def submit(cluster: Cluster, job: Job, data: Path, folder: Path) -> None:
    here = folder / job.name
    here.mkdir(parents=True, exist_ok=True)
    if job.name in ("corrupt shard", "unreadable tokenizer"):
        data = Path(shutil.copytree(data, here / "data"))
    if job.name == "corrupt shard":
        for shard in (data / "train").glob("shard.*"):
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
    if job.name == "unreadable tokenizer":
        (data / "tokenizer.json").write_text("{")
    config = write_config(
        here, data, training={"steps": 12, "eval_every": 0, "spike_window": 8},
        checkpoint={"every": 6},
    )  # fmt: skip
    program = here / "program"
    program.write_text(
        f'#!/bin/bash\nexport FAULT="{job.name}" PYTHONPATH={ROOT}\ncd {ROOT}\n{job.setup}\n'
        f'exec {sys.executable} -m {"pretrain" if job.preflight else "tests.slurm.faulty"} "$@"\n'
    )
    program.chmod(0o755)
    job.id = cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=1", "--exclusive", f"--output={here}/log",
        ROOT / "slurm/pretrain.sbatch", config,
        cwd=here, env={"TRANSXSSM": str(program), "TRANSXSSM_PREFLIGHT": str(int(job.preflight))},
    )  # fmt: skip


def test_every_fault_has_its_end(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    found = jobs(tmp_path)
    for job in found:
        submit(cluster, job, tiny_data, tmp_path)
    for job in found:
        state = cluster.wait(job.id, timeout=SECONDS * len(found))
        log = (tmp_path / job.name / "log").read_text()
        assert state == job.state, f"{job.name}: {log}"
        assert job.says in log, f"{job.name}: {log}"
        assert cluster.job(job.id)["Restarts"] == "0"
        if state == "FAILED":
            errors = [line for line in log.splitlines() if line.startswith("error: ")]
            assert errors, log
            assert job.says in errors[0]
            assert "Traceback" not in log
        else:
            assert read_metrics(tmp_path / job.name / "run")[-1]["skipped_updates"] == 1
            events = (tmp_path / job.name / "run/events.jsonl").read_text().splitlines()
            assert "update skipped" in {json.loads(line)["event"] for line in events}
