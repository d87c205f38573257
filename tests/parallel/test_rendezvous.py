"""Where the processes of a job meet: torchrun's store over its starts, and bad variables."""

import os
from contextlib import redirect_stderr
from datetime import timedelta
from io import StringIO

import pytest
import torch
import torch.distributed as dist

from benchmarks.ranks import free_port, run_ranks
from parallel.launch import Launch, LaunchError, launch_from_environment

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def sum_of_ranks(port: int, restarts: list[int]) -> float:
    """Of a start under torchrun, whose agent has the store; each rank's agent counts restarts."""
    from parallel.groups import init_distributed

    rank = int(os.environ["RANK"])
    os.environ |= {
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(restarts[rank]),
    }
    init_distributed(launch_from_environment(), torch.device("cpu"), timedelta(seconds=60))
    number = torch.tensor(float(rank + 1))
    dist.all_reduce(number)
    return float(number)


def test_every_start_under_torchrun_meets_anew_in_the_store_of_its_agent() -> None:
    """Ranks of the start before are dead, and on another node it may have been another one."""
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert run_ranks(2, sum_of_ranks, port, [0, 0]) == [3.0, 3.0]
    agent.add("tickets", 1)  # of a rank that died before it was answered
    assert run_ranks(2, sum_of_ranks, port, [1, 0]) == [3.0, 3.0]


def wait_for_nobody(port: int) -> tuple[str, str]:
    """What rank 0 says, and what it ends with, whose only peer never comes."""
    from parallel import rendezvous
    from parallel.groups import init_distributed

    rendezvous.SECONDS_OF_SILENCE = 0.3
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    with redirect_stderr(StringIO()) as said, pytest.raises(LaunchError) as raised:
        init_distributed(launch_from_environment(), torch.device("cpu"), timedelta(seconds=2))
    return said.getvalue(), str(raised.value)


def test_a_rank_says_that_it_waits_for_the_others() -> None:
    port = free_port()
    ((said, error),) = run_ranks(1, wait_for_nobody, port)
    assert said.count("rank 0 of 2") == 1
    assert error.startswith("rank 0 of 2 cannot meet the others at MASTER_ADDR=127.0.0.1")
    assert f"is still waiting for the others at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in said


def join_alone(environments: list[dict[str, str]]) -> list[int]:
    """At which port a process by itself listens, by its environment."""
    from parallel.groups import init_distributed

    ports = []
    for environment in environments:
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ |= environment
        init_distributed(launch_from_environment(), torch.device("cpu"))
        ports.append(int(os.environ["MASTER_PORT"]))
        dist.TCPStore("127.0.0.1", ports[-1], is_master=False)
        dist.destroy_process_group()
    return ports


def test_one_process_needs_no_port_of_anyone() -> None:
    port = free_port()
    taken = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert taken.port == port
    environments = [
        {},
        {"MASTER_PORT": str(port)},
        {"MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"},
        {"MASTER_PORT": "none", "MASTER_ADDR": "elsewhere"},
    ]
    (ports,) = run_ranks(1, join_alone, environments)
    assert port not in ports


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "MASTER_PORT is not set"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "auto"},
            "MASTER_PORT='auto' is no number",
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "70000"},
            "MASTER_PORT=70000 is no port",
        ),
        ({"RANK": "1"}, "RANK=1 is set, WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is no number"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "are not set"),
    ],
)
def test_bad_launch_variables_are_one_sentence(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*VARIABLES, "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message) as raised:
        launch_from_environment()
    assert "\n" not in str(raised.value)


def test_name_of_no_host_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel import rendezvous

    monkeypatch.setattr(rendezvous, "SECONDS_TO_FIND_HOST", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=no-such-host.invalid is no host"):
        rendezvous.join_store(Launch(1, 2, 1), timedelta(seconds=5))
