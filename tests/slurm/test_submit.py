"""`transxssm submit` and the commands about what it submitted."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.slurm_cluster import Cluster
from pretrain.cli import app
from pretrain.config import ConfigError, load_config
from slurm.cli import _sparkline
from slurm.cluster import load_cluster
from slurm.jobs import SlurmError
from slurm.runs import run_status
from slurm.submit import seconds
from tests.pretrain.command import succeed, write_config

ROOT = Path(__file__).parents[2]
TRANSXSSM = Path(sys.executable).with_name("transxssm")
PRESETS = {"demo": 1, "320m": 1, "1.3b": 2, "7b": 4}


def run(*words: Any) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("preset", PRESETS)
def test_script_of_every_preset_is_one_that_slurm_takes(
    preset: str, cluster: Cluster, tmp_path: Path
) -> None:
    script = run(
        "submit", ROOT / f"configs/{preset}.toml", "--nodes", PRESETS[preset], "--time", "1-0",
        "--partition", "main", "--gpus-per-node", 8, "--dry-run", "--training.micro_batch_size=1",
        "--training.global_batch_size=1024", f"--logging.run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()
    (tmp_path / "job.sbatch").write_text(script)
    done = cluster.run("sbatch", "--test-only", tmp_path / "job.sbatch")
    assert done.returncode == 0, done.stderr
    assert f"#SBATCH --nodes={PRESETS[preset]}\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert "#SBATCH --signal=USR1@180\n" in script


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes", "0"], "--nodes 0: write a number"),
        (["--nodes", "3", "--gpus-per-node", "0"], "global_batch_size=4 is not a multiple of"),
        (["--nodes", "1-999999999", "--elastic"], "no more than 131,072 can be used"),
        (["--nodes", "1-2"], "only --elastic lets the layout follow it"),
        (["--nodes", "1", "--gpus-per-node", "1", "--time", "2"], "training.stop_before_limit=120"),
        (["--nodes", "1", "--gpus-per-node", "1", "--time", "soon"], "--time soon: write minutes"),
        (["--nodes", "1", "--gpus-per-node", "1", "--time", 10 * "9"], "write minutes"),
    ],
)
def test_request_that_cannot_run(
    words: list[str], says: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data)
    with pytest.raises(ConfigError, match=re.escape(says)):
        run("submit", config, *words)
    assert not (tmp_path / "run").exists()


def test_model_that_does_not_fit_its_gpus_is_not_submitted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GiB of --gpu-memory"):
        run("submit", ROOT / "configs/7b.toml", "--nodes", 1, "--gpus-per-node", 1,
            "--parallel.tensor=1", "--training.global_batch_size=8", "--dry-run")  # fmt: skip


def test_data_that_is_not_there_and_slurm_that_is_not(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, tiny_data)
    request = ("submit", config, "--nodes", 1, "--gpus-per-node", 0)
    with pytest.raises(ConfigError, match=r"data\.train=/nowhere: nothing is there"):
        run(*request, "--data.train=/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match="sbatch is not on PATH"):
        run(*request)


def test_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cluster.toml"
    monkeypatch.setenv("TRANSXSSM_CLUSTER", str(path))
    path.write_text((ROOT / "slurm/cluster.toml.example").read_text())
    assert load_cluster().cpus_per_task == 12
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors begin a file
    assert load_cluster().cpus_per_task == 12
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("TRANSXSSM_CLUSTER", "$HERE/cluster.toml")
    assert load_cluster().cpus_per_task == 12
    monkeypatch.setenv("TRANSXSSM_CLUSTER", "${NOWHERE}/cluster.toml")
    with pytest.raises(ConfigError, match=r"CLUSTER=.*: the variable NOWHERE is not set"):
        load_cluster()
    monkeypatch.setenv("TRANSXSSM_CLUSTER", str(path))
    path.write_text("gpu_per_node = 4")
    with pytest.raises(
        ConfigError, match=r"unknown field gpu_per_node; the nearest .* gpus_per_no"
    ):
        load_cluster()
    path.write_text("gpus_per_node = 'four'")
    with pytest.raises(ConfigError, match="gpus_per_node='four': "):
        load_cluster()


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 5400.0), ("1:30", 90.0), ("2:00:00", 7200.0), ("1-0", 86400.0), ("1-2:03", 93780.0),
     ("0", None), ("", None), ("UNLIMITED", None)],
)  # fmt: skip
def test_time_limits(text: str, value: float | None) -> None:
    assert seconds(text) == value


def test_submitted_run_is_listed_followed_and_cancelled(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "run 'of' \"b\" #2 100%j --array=1-3 é"
    config = write_config(tmp_path / "runs", tiny_data, logging={"run_dir": str(run_dir)})
    program = tmp_path / "program"
    program.write_text("#!/bin/bash\necho trains: $*\nfor _ in {1..300}; do sleep 0.1; done\n")
    program.chmod(0o755)

    def transxssm(*words: Any) -> str:
        env = {"TRANSXSSM": str(program), "TRANSXSSM_PREFLIGHT": "0", "PYTHONPATH": str(ROOT)}
        done = cluster.run(TRANSXSSM, *words, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = transxssm("submit", config, "--nodes", 2, "--gpus-per-node", 0, "--time", 5)
    job_id = said.split()[1].rstrip(":")
    assert f"transxssm status {shlex.quote(str(run_dir))}" in said
    assert load_config(run_dir / "config.toml") == load_config(config)
    cluster.wait(job_id, ("RUNNING",))
    again = cluster.run(TRANSXSSM, "submit", config, "--nodes", 2, "--gpus-per-node", 0)
    assert again.returncode == 2
    assert f"is that of job {job_id}, which is running" in again.stderr
    (found,) = json.loads(transxssm("runs", tmp_path, "--json"))
    assert (found["job_id"], found["state"], found["total_steps"]) == (job_id, "running", 6)
    deadline = time.monotonic() + 20
    while "trains" not in (run_dir / f"job-{job_id}.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert f"trains: pretrain {run_dir}/config.toml" in transxssm("logs", run_dir)
    assert f"cancelled {job_id}" in transxssm("cancel", run_dir)
    assert cluster.wait(job_id) == "CANCELLED"
    assert json.loads(transxssm("status", run_dir, "--json"))["state"] in (
        "not started",
        "completing",
    )


def test_status_where_slurm_does_not_answer(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("pretrain", write_config(tmp_path, tiny_data, training={"steps": 3}))
    silent = tmp_path / "bin"
    silent.mkdir()
    (silent / "squeue").write_text("#!/bin/sh\necho no controller >&2; exit 1\n")
    (silent / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{silent}:{os.environ['PATH']}")
    words = (sys.executable, "-m", "pretrain", "status", tmp_path / "run")
    done = subprocess.run([*words, "--watch"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr  # finished: it does not go on looking
    assert "warning: Slurm does not answer, and jobs are not shown: squeue" in done.stderr
    for said in ("finished", "recent losses", "3"):
        assert said in done.stdout
    assert _sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert _sparkline([1.0]) == ""


def test_status_of_runs_that_slurm_knows_nothing_of(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError, match="no run directory"):
        run_status(run_dir, {})
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.toml").write_text(config.read_text())
    assert run_status(run_dir, {}).state == "not started"
    line = {"step": 3, "tokens": 768, "loss": 5.0, "tokens_per_second": 256.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "to')
    found = run_status(run_dir, {})
    assert (found.state, found.step, found.seconds_left) == ("running", 3, 3.0)
    (run_dir / "logs/first_failure.txt").write_text("rank 1 on node2: out of memory")
    assert run_status(run_dir, {}).state == "failed"
    (run_dir / "metrics.jsonl").write_text(json.dumps(line | {"step": 6, "tokens": 1536}) + "\n")
    assert run_status(run_dir, {}).state == "finished"
