"""Where this process stands in its job, from the launcher's environment. Imports no torch."""

import os
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

    Raises LaunchError for several tasks of srun without a rendezvous address.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launch(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", 0)),
            int(env.get("LOCAL_WORLD_SIZE", 0)),
        )
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
            raise LaunchError(
                f"srun started {env['SLURM_NTASKS']} tasks, but {' and '.join(missing)} is not "
                "set, so they cannot find each other; submit slurm/pretrain.sbatch, or export "
                "both: the first node's address and a free port"
            )
        return Launch(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_NTASKS"]),
            int(env.get("SLURM_LOCALID", 0)),
            int(env.get("SLURM_NTASKS_PER_NODE", 0)),
        )
    return Launch(0, 1, 0)


def host_name() -> str:
    """Of the node this process runs on, as Slurm knows it where there is Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
