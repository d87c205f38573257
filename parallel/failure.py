"""The first cause, told to every rank.

A rank that fails leaves its message in the job's store before it exits. Its peers, whose
collectives then break, report that message rather than a broken connection.
"""

import contextlib
from datetime import timedelta

import torch.distributed as dist

KEY = "transxssm/first_failure"


def announce(message: str) -> None:
    """Leave `message` for the other ranks; the first one stands."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):  # rank 0, which holds the store, may be gone
            store = dist.distributed_c10d._get_default_store()
            store.compare_set(KEY, "", f"rank {dist.get_rank()}: {message}")


def first_failure(seconds: float) -> str | None:
    """What another rank announced, waiting for it at most `seconds`; None if nobody did."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    try:
        store = dist.distributed_c10d._get_default_store()
        store.wait([KEY], timedelta(seconds=seconds))
        return str(store.get(KEY).decode())
    except RuntimeError:
        return None
