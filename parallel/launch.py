"""Where this process stands in its job, from the launcher's environment. Imports no torch."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    local_rank: int


def launch_from_environment() -> Launch:
    """Rank and world size from torchrun's variables, else Slurm's (srun), else a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launch(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        return Launch(
            int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
        )
    return Launch(0, 1, 0)
