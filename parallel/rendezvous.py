"""The job's key-value store, under a name of its own for each start of the job's processes.

torchrun's agent keeps one store for all of its starts, in which a new start would read the
addresses of dead ranks. TORCHELASTIC_RESTART_COUNT does not tell starts apart on several nodes:
each agent counts its own. So rank 0 names the start, and every other rank asks for that name:

    rank r    draws a ticket T, a number that nobody had before, and waits for `start/T`
    rank 0    answers all tickets with the start's name, until every rank of this start has counted
              itself in `joined/NAME`; those of dead ranks are answered, too
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from parallel.launch import Launch, LaunchError, host_name, meeting_place

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_FIND_HOST = 30.0  # a name that another node brings may come late
SECONDS_OF_SILENCE = 30.0  # while ranks wait for each other

_start = ""
"""Prefix of this start's keys."""


def join_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """Return the store of this start, once all ranks have met there.

    A process by itself listens on a port of its own, and what the environment says of an address is
    not used. Raises LaunchError where the address is taken, names no host, or nobody answers.
    """
    global _start
    env = os.environ
    if launch.world_size == 1:
        # a port that is looked for first may be another's by the time it is listened on
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)
        env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(store.port)
        return store
    address, port = meeting_place(launch)
    _check_host(address)
    try:
        found = dist.TCPStore(
            address,
            port,
            launch.world_size,
            is_master=launch.rank == 0 and not _agent_has_store(),
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        if _agent_has_store():
            _start = _name_of_start(found, launch, timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise cannot_meet(error, launch) from error
    return dist.PrefixStore(_start, found) if _start else found


@contextmanager
def reported_if_slow(launch: Launch) -> Iterator[None]:
    """Print once, on stderr, that this node waits for the others, if it still does after a while.

    Printed by the first rank of each node.
    """
    if launch.local_rank:
        yield
        return

    def report() -> None:
        address, port = meeting_place(launch)
        print(
            f"rank {launch.rank} of {launch.world_size} on {host_name()} is still waiting for the "
            f"others at MASTER_ADDR={address}, MASTER_PORT={port}",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(SECONDS_OF_SILENCE, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def connect(timeout: timedelta) -> dist.Store:
    """Another connection to the store of this start, which `join_store` has joined."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(_start, store) if _start else store


def _agent_has_store() -> bool:
    """Whether torchrun's agent listens at the job's address, and no rank is to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _name_of_start(store: dist.Store, launch: Launch, timeout: timedelta) -> str:
    """Agree with all ranks of this start on its name [see above]."""
    ticket = store.add("tickets", 1)
    if launch.rank:
        store.wait([f"start/{ticket}"], timeout)
        name = store.get(f"start/{ticket}").decode()
        store.add(f"joined/{name}", 1)
        return name
    name, answered = f"start-{ticket}", 0
    deadline = time.monotonic() + timeout.total_seconds()
    while store.add(f"joined/{name}", 0) < launch.world_size - 1:
        drawn = store.add("tickets", 0)
        for other in range(answered + 1, drawn + 1):
            store.set(f"start/{other}", name)
        answered = drawn
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"not all ranks came within {timeout}")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return name


def _check_host(address: str) -> None:
    """Raise LaunchError for a name that means no host; connecting would wait for it to the end of
    its time."""
    deadline = time.monotonic() + SECONDS_TO_FIND_HOST
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"MASTER_ADDR={address} is no host that {host_name()} can find "
                    f"({error.strerror}); export the address of the host of rank 0"
                ) from error
            time.sleep(1)


def cannot_meet(error: Exception, launch: Launch) -> LaunchError:
    """Return what to raise for an error of connecting to the others."""
    address, port = meeting_place(launch)
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text:
        return LaunchError(
            f"port {port} of {address} is in use, so that the processes cannot meet there; choose "
            "another MASTER_PORT (torchrun: --master-port), or end the job that has it"
        )
    return LaunchError(
        f"rank {launch.rank} of {launch.world_size} cannot meet the others at MASTER_ADDR="
        f"{address}, MASTER_PORT={port} ({text:.300}); see that rank 0 runs on that host, and that "
        "its address and port can be reached from the others"
    )
