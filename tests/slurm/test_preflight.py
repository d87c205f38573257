"""Nodes are compared before a run: bad ones are named and left out, wrong installations refused."""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.slurm_cluster import Cluster
from parallel import self_check
from slurm.preflight import (
    BAD_NODES,
    Report,
    bad_nodes,
    differences,
    gpu_faults,
    unusable_paths,
)
from tests.parallel.failing_path import fail_first_path
from tests.pretrain.command import paragraph, run_command, write_config

ROOT = Path(__file__).parents[2]


def be_another_node(
    only_rank: int, slow: bool = False, edited: bool = False, nothing_instead: bool | None = None
) -> None:
    """Every rank is a host of its own; one has a slow memory, or another source file, or a fast
    path that fails, perhaps with what is to run instead."""
    from slurm import preflight

    rank = int(os.environ.get("RANK", "0"))
    os.environ["SLURMD_NODENAME"] = f"host{rank}"
    os.environ["LOCAL_RANK"] = "0"
    speeds, installed = preflight._speeds, preflight.installed
    if rank == only_rank and slow:
        preflight._speeds = lambda device: {k: v / 1000 for k, v in speeds(device).items()}
    if rank == only_rank and edited:
        preflight.installed = lambda: installed() | {"source": "edited"}
    if rank == only_rank and nothing_instead is not None:
        fail_first_path(nothing_instead)


def test_fit_nodes(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    ends = run_command("preflight", config, ranks=2, before=partial(be_another_node, -1))
    assert [end.code for end in ends] == [0, 0], ends[0].output
    assert "every node is fit" in ends[0].output
    ranks = json.loads((tmp_path / "run/preflight.json").read_text())["ranks"]
    assert {name for rank in ranks for name in rank["speeds"]} == {
        "matrix product TFLOP/s", "memory GB/s", "run directory MB/s",
        "all-reduce over data ranks GB/s",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.json"]


def test_slow_node_is_named_on_every_rank(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    before = partial(be_another_node, 1, slow=True)
    sizes = ("--training.global_batch_size=6", "--training.micro_batch_size=1")
    ends = run_command("preflight", config, *sizes, ranks=3, before=before)
    assert [end.code for end in ends] == [BAD_NODES] * 3, ends[0].output
    assert "bad nodes: host1: rank 1: m" in ends[0].output
    found = json.loads((tmp_path / "run/preflight.json").read_text())["bad_nodes"]
    assert list(found) == ["host1"]


def test_another_installation_is_refused_on_every_rank(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    before = partial(be_another_node, 1, edited=True)
    ends = run_command("preflight", config, ranks=2, before=before)
    for end in ends:
        assert end.code == 1
        said = paragraph(end.output)
        assert "different installations: source: " in said
        assert "edited on host1" in said


def test_what_is_compared() -> None:
    same = {"torch": "2.14"}
    reports = [Report(rank, f"node{rank // 2}", same, speeds={"GB/s": 10.0}) for rank in range(8)]
    assert differences(reports) is None
    assert bad_nodes(reports, 1.5) == {}
    late = Report(8, "late", same, clock=60.0, faults=["GPU 0: gone"])
    slow = Report(9, "slow", {}, speeds={"GB/s": 6.0})
    early = Report(10, "early", same, clock=-60.0)
    assert bad_nodes([*reports, late, slow, early], 1.5) == {
        "early": ["its clock is -60 s off"],
        "late": ["GPU 0: gone", "its clock is +60 s off"],
        "slow": ["rank 9: GB/s 6, usually 10"],
    }
    assert "torch: 2.14 on node0, node1, node2, node3, absent on slow" in str(
        differences([*reports, slow])
    )


def test_a_path_that_fails_on_few_ranks_is_their_nodes_fault() -> None:
    path, reason = self_check.CHECKS[0].path, "results differ"
    reports = [Report(rank, f"node{rank // 2}", {}) for rank in range(8)]
    reports[3] = replace(reports[3], paths={path: reason})
    assert bad_nodes(reports, 1.5) == {"node1": [f"rank 3: {path}: {reason}"]}
    assert unusable_paths(reports) == []


def test_a_path_that_fails_on_most_ranks_is_no_nodes_fault() -> None:
    path, reason = self_check.CHECKS[0].path, "results differ"
    reports = [Report(rank, "node", {}, paths={path: reason} if rank else {}) for rank in range(4)]
    assert bad_nodes(reports, 1.5) == {}
    assert unusable_paths(reports) == [
        f"{path} failed its check on the device: rank 1: {reason}; on all ranks weight gradients"
        " are rounded before they are summed instead"
    ]


@pytest.mark.parametrize("nothing_instead", [False, True])
def test_paths_are_checked_on_every_rank(
    tiny_data: Path, tmp_path: Path, nothing_instead: bool
) -> None:
    config = write_config(tmp_path, tiny_data)
    before = partial(be_another_node, 1, nothing_instead=nothing_instead)
    sizes = ("--training.global_batch_size=6", "--training.micro_batch_size=1")
    ends = run_command("preflight", config, *sizes, ranks=3, before=before)
    assert [end.code for end in ends] == [BAD_NODES] * 3, ends[0].output
    found = json.loads((tmp_path / "run/preflight.json").read_text())["bad_nodes"]
    (fault,) = found["host1"]
    assert self_check.CHECKS[0].path in fault
    assert "RuntimeError: no such kernel" in fault
    assert ("fails as well" in fault) == nothing_instead


def test_what_gpus_say_of_themselves() -> None:
    assert gpu_faults("0, 0, Not Active, 4\n1, [N/A], Not Active, 512\n") == []
    assert gpu_faults("3, 2, Active, 70000\n") == [
        "GPU 3: 2 memory errors that could not be corrected",
        "GPU 3: slowed down by the hardware (heat or power)",
        "GPU 3: 70000 MiB in use, before the job has begun",
    ]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Finds node1 bad; trains in no time."""
    path = tmp_path / "program"
    path.write_text(
        "#!/bin/bash\n"
        "trap '' TERM  # as preflight, once it has found its answer\n"
        "case $1 in\n"
        "preflight)\n"
        "    touch $0.$SLURM_JOB_ID.$SLURM_RESTART_COUNT.$SLURM_PROCID\n"
        "    until [[ $(ls $0.$SLURM_JOB_ID.$SLURM_RESTART_COUNT.* | wc -l) == $SLURM_NTASKS ]]\n"
        "    do sleep 0.1; done  # no rank has an answer before all are there\n"
        "    [[ $SLURM_JOB_NODELIST == *1* ]] && exit 86 || exit 0 ;;\n"
        "bad-nodes) echo node1 ;;\n"
        "*) echo trains on $(hostname) ;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return path


def test_job_leaves_out_a_bad_node_once(cluster: Cluster, program: Path, tmp_path: Path) -> None:
    submit = ("--ntasks-per-node=1", ROOT / "slurm/pretrain.sbatch", "a.toml")
    env = {"TRANSXSSM": str(program), "TRANSXSSM_PREFLIGHT": "1"}
    job = cluster.sbatch("--nodes=2", *submit, cwd=tmp_path, env=env)
    hopeless = cluster.sbatch("--nodes=2", "--exclude=node4", *submit, cwd=tmp_path, env=env)
    assert cluster.wait(job) == "COMPLETED"
    log = (tmp_path / f"transxssm-{job}.log").read_text()
    assert "== node1: left out, the job is requeued" in log
    assert log.count("trains on node") == 2
    assert cluster.job(job)["ExcNodeList"] == "node1"
    assert cluster.wait(hopeless) == "FAILED"
    assert cluster.job(hopeless)["ExitCode"] == "86:0"


def test_import_error_on_one_node_is_named(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data)
    program = tmp_path / "program"
    program.write_text(
        f"#!/bin/bash\n[[ $(hostname) == node2 ]] && export PYTHONPATH={tmp_path}/broken\n"
        f'cd {ROOT}; exec {sys.executable} -P -m pretrain "$@"\n'
    )
    program.chmod(0o755)
    (tmp_path / "broken/torch").mkdir(parents=True)
    (tmp_path / "broken/torch/__init__.py").write_text('raise ImportError("libcudart.so.12")\n')
    job = cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=1", ROOT / "slurm/pretrain.sbatch", config,
        cwd=tmp_path, env={"TRANSXSSM": str(program)},
    )  # fmt: skip
    assert cluster.wait(job) == "FAILED"
    log = (tmp_path / f"transxssm-{job}.log").read_text()
    assert "error: rank 1 on node2: ImportError: libcudart.so.12" in log
    assert log.count("Traceback") == 1
