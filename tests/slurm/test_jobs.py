"""What slurm/pretrain.sbatch makes of how its tasks end, on a real Slurm with a quick program in
place of training."""

import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.slurm_cluster import Cluster
from tests.conftest import missing

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm/pretrain.sbatch"
PROGRAM = """\
#!/bin/bash
# waits to be told to stop, which takes it a second; from start FAKE_STARTS on it ends with FAKE_END
echo "rank $SLURM_PROCID of $SLURM_NTASKS on $(hostname), $MASTER_ADDR:$MASTER_PORT: $*"
mkdir -p "$TRITON_CACHE_DIR"
trap 'sleep 1; exit 85' USR1 TERM
[[ ${SLURM_RESTART_COUNT:-0} -ge ${FAKE_STARTS:-1} ]] && exit "${FAKE_END:-0}"
for _ in {1..600}; do sleep 0.1; done
"""


class Job:
    """A submitted slurm/pretrain.sbatch with PROGRAM on 2 nodes of 2 tasks."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str, **env: str) -> None:
        program = folder / "program"
        program.write_text(PROGRAM)
        program.chmod(0o755)
        self.cluster, self.folder = cluster, folder
        self.id = cluster.sbatch(
            "--nodes=2", "--ntasks-per-node=2", *words, SCRIPT, "a.toml", "--x.y", "a b",
            cwd=folder, env={"TRANSXSSM": str(program), "TRANSXSSM_PREFLIGHT": "0", **env},
        )  # fmt: skip

    @property
    def log(self) -> str:
        path = self.folder / f"transxssm-{self.id}.log"
        return path.read_text() if path.exists() else ""

    @property
    def restarts(self) -> str:
        return self.cluster.job(self.id)["Restarts"]

    def wait_for_ranks(self, starts: int = 1) -> None:
        """Until all four tasks have begun, for the so-manieth time."""
        deadline = time.monotonic() + 40
        while self.log.count("rank ") < 4 * starts:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def wait(self) -> str:
        return self.cluster.wait(self.id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where jobs are submitted from."""
    return tmp_path


def test_scripts_pass_shellcheck() -> None:
    scripts = [*ROOT.glob("slurm/*.sbatch"), *ROOT.glob("benchmarks/*.sh")]
    try:
        done = subprocess.run(
            ["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        missing("no shellcheck: apt-get install shellcheck")
    assert done.returncode == 0, done.stdout


def test_when_a_job_is_requeued(cluster: Cluster, folder: Path) -> None:
    """Told to stop; cancelled; failed; hung; told to stop once too often. All at the same time on
    the same nodes."""
    told = Job(cluster, folder)
    cancelled = Job(cluster, folder)
    failed = Job(cluster, folder, FAKE_STARTS="0", FAKE_END="3")
    hung = Job(cluster, folder, FAKE_STARTS="0", FAKE_END="185", TRANSXSSM_MAX_REQUEUES="1")
    capped = Job(cluster, folder, TRANSXSSM_MAX_REQUEUES="0")
    for job in (told, cancelled, capped):
        job.wait_for_ranks()
    cluster.run("scancel", "--signal=USR1", told.id, capped.id)
    cluster.run("scancel", cancelled.id)

    assert told.wait() == "COMPLETED"
    assert told.restarts == "1"
    starts = [line for line in told.log.splitlines() if line.startswith("rank ")]
    assert len(starts) == 8  # the output of both starts
    places = {line.split(": ")[0].split(", ")[1] for line in starts}
    assert len(places) == 2, "another port at every start"
    assert {place.split(":")[0] for place in places} == {"node1"}
    assert all(line.endswith(": pretrain a.toml --x.y a b") for line in starts)
    assert sorted(line.split(",")[0] for line in starts[:4]) == [
        "rank 0 of 4 on node1", "rank 1 of 4 on node1", "rank 2 of 4 on node2",
        "rank 3 of 4 on node2",
    ]  # fmt: skip

    assert failed.wait() == "FAILED"
    assert (failed.restarts, cluster.job(failed.id)["ExitCode"]) == ("0", "3:0")
    assert capped.wait() == "FAILED"
    assert (capped.restarts, cluster.job(capped.id)["ExitCode"]) == ("0", "85:0")
    assert "as often as TRANSXSSM_MAX_REQUEUES allows" in capped.log
    assert hung.wait() == "FAILED"
    assert (hung.restarts, cluster.job(hung.id)["ExitCode"]) == ("1", "185:0")
    assert cancelled.wait() == "CANCELLED"  # by now it would have come back
    assert cancelled.restarts == "0"
    for job in (told, failed, capped, hung):
        assert not Path(f"/tmp/transxssm-cache-{job.id}").exists()


def test_preempted_jobs_come_back(cluster: Cluster, folder: Path) -> None:
    """By Slurm without, and by the script with a time of grace."""
    jobs = [Job(cluster, folder, f"--partition={name}") for name in ("main", "graceful")]
    for job in jobs:
        job.wait_for_ranks()
    cluster.sbatch("--nodes=4", "--partition=urgent", "--exclusive", "--wrap", "sleep 1")
    for job in jobs:
        assert job.wait() == "COMPLETED", job.log
        assert job.restarts == "1"


def test_elastic_job_uses_the_nodes_that_its_layout_can(cluster: Cluster, folder: Path) -> None:
    program = folder / "program"
    program.write_text(
        '#!/bin/bash\n[[ $1 == nodes ]] && echo 2 || echo "of $SLURM_NTASKS: $*, $(hostname)"\n'
    )
    program.chmod(0o755)
    job = cluster.sbatch(
        "--nodes=3", "--ntasks-per-node=2", SCRIPT, "a.toml", cwd=folder,
        env={"TRANSXSSM": str(program), "TRANSXSSM_ELASTIC": "1"},
    )  # fmt: skip
    assert cluster.wait(job) == "COMPLETED"
    log = (folder / f"transxssm-{job}.log").read_text()
    for node in ("node1", "node2"):
        assert log.count(f"of 4: pretrain a.toml, {node}") == 2
