"""Run a function on several gloo ranks, in processes forked from one that imported everything."""

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_SECONDS = 240
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.ranks_preload"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on every rank, with the launcher's environment set; results by rank.

    `function` must be importable. Any rank's exception fails the call, with every traceback.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_run_rank, args=(rank, world_size, port, sender, function, args), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results, failures = [], []
    for rank, (receiver, process) in enumerate(zip(pipes, processes, strict=True)):
        try:
            if not receiver.poll(TIMEOUT_SECONDS):
                raise EOFError
            good, value = pickle.loads(receiver.recv_bytes())
        except EOFError:
            process.kill()
            good, value = False, f"no answer (exit code {process.exitcode})"
        if good:
            results.append(value)
        else:
            failures.append(f"--- rank {rank}: {value}")
    for process in processes:
        process.join(10)
        process.kill()
    if failures:
        raise AssertionError("\n".join(failures))
    return results


def free_port() -> int:
    """A port of this host for ranks to meet at, from below those that connections get by
    themselves, so that none of these takes it before the ranks do."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _run_rank(
    rank: int, world_size: int, port: int, sender: Any, function: Callable[..., Any], args: Any
) -> None:
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(result))  # by value: torch would share file descriptors
    sender.close()
    os._exit(0)  # the interpreter's end would wait for peers that already left
