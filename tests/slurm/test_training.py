"""Training on a real Slurm: right on any number of nodes, and after what happens to nodes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.command import read_metrics
from benchmarks.slurm_cluster import Cluster
from benchmarks.slurm_training import TrainingJob, curve
from tests.pretrain.command import succeed, write_config

ROOT = Path(__file__).parents[2]
SECTIONS: dict[str, Any] = {
    "training": {"steps": 40, "eval_every": 20, "stop_before_limit": 200},
    "checkpoint": {"every": 5},
}


@pytest.fixture(scope="module")
def config(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("slurm"), tiny_data, **SECTIONS)


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The run directory of two ranks that nothing interrupts."""
    run_dir = config.with_name("whole")
    succeed("pretrain", config, f"--logging.run_dir={run_dir}", ranks=2)
    return run_dir


def test_jobs_of_two_and_four_nodes_train_as_one_process_does(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    short = ("--training.steps=6", "--training.micro_batch_size=1", "--training.eval_every=6")
    jobs = [
        TrainingJob(
            cluster, config, tmp_path / f"run{nodes}", *short, nodes=nodes, preflight=nodes == 2
        )
        for nodes in (2, 4)
    ]
    succeed("pretrain", config, *short, f"--logging.run_dir={tmp_path / 'alone'}")
    expected = read_metrics(tmp_path / "alone")
    for job in jobs:
        assert job.wait() == "COMPLETED", job.log
        found = read_metrics(job.run_dir)
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for name in ("loss", "grad_norm"):
            values = [line[name] for line in found]
            assert values == pytest.approx([line[name] for line in expected], rel=1e-5)
        assert "validation_loss" in found[-1]
    assert "every node is fit" in jobs[0].log
    evaluation = cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/evaluation.log",
        ROOT / "slurm/evaluate.sbatch", jobs[0].run_dir, "--text", ROOT / "README.md", "--out",
        tmp_path / "evaluation", "--max-length", "64",
        cwd=tmp_path, env={"TRANSXSSM": str(Path(sys.executable).with_name("transxssm"))},
    )  # fmt: skip
    assert cluster.wait(evaluation) == "COMPLETED", (tmp_path / "evaluation.log").read_text()
    (found,) = json.loads((tmp_path / "evaluation/results.json").read_text())["results"].values()
    succeed(
        "evaluate", tmp_path / "alone", "--text", ROOT / "README.md", "--max-length", "64",
        "--out", tmp_path / "here",
    )  # fmt: skip
    (here,) = json.loads((tmp_path / "here/results.json").read_text())["results"].values()
    assert found["bits_per_byte"] == pytest.approx(here["bits_per_byte"], rel=1e-5)


def test_job_whose_time_ends_and_whose_node_dies_completes_digit_for_digit(
    cluster: Cluster, config: Path, whole: Path, tmp_path: Path
) -> None:
    job = TrainingJob(cluster, config, tmp_path / "run", step=0.3, options=("--time=10",))
    dead = 0
    try:
        job.until(lambda: job.step >= 8)
        cluster.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+50seconds")
        job.until(lambda: "ended with 85: requeued" in job.log)
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
        stopped_at = job.step
        job.until(lambda: job.starts == 2 and job.step > stopped_at)
        dead = job.nodes[-1]
        cluster.power_off(dead)
        assert job.wait() == "COMPLETED", job.log
        assert job.field("Restarts") == "2"
        assert job.starts == 3
        assert dead not in job.nodes
        assert "stopped, all saved (" in job.log
        assert curve(job.run_dir) == curve(whole)
    finally:
        if dead:
            cluster.power_on(dead)
            cluster.wait_for_nodes()
