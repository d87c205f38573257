"""Where this process stands in its job, from the launcher's environment. Imports no torch."""

import os
import re
import socket
from dataclasses import dataclass

from untrusted.errors import UserError


@dataclass(frozen=True)
class Launch:
    """Where this process stands in the job. ranks_per_node: 0 where the launcher does not say."""

    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int = 0


class LaunchError(UserError):
    """The launcher's environment does not say how the processes find each other."""

    exit_code = 2


def launch_from_environment() -> Launch:
    """Rank and world size from torchrun's variables, else Slurm's (srun), else a single process.

    Raises LaunchError for variables that contradict each other, and for several tasks of srun
    without a rendezvous address.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        if missing := [name for name in ("RANK", "WORLD_SIZE") if name not in env]:
            given = next(name for name in ("RANK", "WORLD_SIZE") if name in env)
            raise LaunchError(
                f"{given}={env[given]} is set, {missing[0]} is not; start the processes with "
                "torchrun or srun, export both, or unset both for one process"
            )
        launch = Launch(
            _number("RANK"),
            _number("WORLD_SIZE"),
            _number("LOCAL_RANK", 0),
            _number("LOCAL_WORLD_SIZE", 0),
        )
        if launch.rank >= launch.world_size:
            raise LaunchError(
                f"RANK={launch.rank} and WORLD_SIZE={launch.world_size}: ranks count from 0 to "
                f"WORLD_SIZE - 1 = {launch.world_size - 1}; correct the launch"
            )
    elif "SLURM_STEP_ID" in env and _number("SLURM_NTASKS", 1) > 1:
        launch = Launch(
            _number("SLURM_PROCID"),
            _number("SLURM_NTASKS"),
            _number("SLURM_LOCALID", 0),
            _number("SLURM_NTASKS_PER_NODE", 0),
        )
    else:
        return Launch(0, 1, 0)
    if launch.world_size > 1:
        meeting_place(launch)
    return launch


def meeting_place(launch: Launch) -> tuple[str, int]:
    """Address and port at which the processes of a job meet: MASTER_ADDR and MASTER_PORT.

    Raises LaunchError where they are missing or are none.
    """
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        are = "is" if len(missing) == 1 else "are"
        raise LaunchError(
            f"this is rank {launch.rank} of {launch.world_size}, but {' and '.join(missing)} {are} "
            "not set, so the processes cannot find each other; use torchrun, submit "
            "slurm/pretrain.sbatch, or export both: the first node's address and a free port"
        )
    port = _number("MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise LaunchError(f"MASTER_PORT={port} is no port; use a free one from 1024 to 65535")
    return os.environ["MASTER_ADDR"], port


def _number(name: str, default: int | None = None) -> int:
    """A variable of the environment. Raises LaunchError."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text):
        raise LaunchError(
            f"{name}={text!r:.80} is no number; unset it, or start the processes with torchrun or "
            "srun, which set it"
        )
    return int(text)


def host_name() -> str:
    """Of the node this process runs on, as Slurm knows it where there is Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
