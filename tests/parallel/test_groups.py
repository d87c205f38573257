"""Joining the job: where the processes meet."""

import socket

from benchmarks.ranks import run_ranks


def join_where_another_listens() -> str:
    """The error of a rank whose port is another's."""
    import os

    import torch

    from parallel.groups import init_distributed
    from parallel.launch import Launch, LaunchError

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        try:
            init_distributed(Launch(0, 2, 0), torch.device("cpu"))
        except LaunchError as error:
            return str(error)
    return ""


def test_a_port_in_use_is_one_sentence() -> None:
    (message,) = run_ranks(1, join_where_another_listens)
    assert "is in use" in message
    assert "choose another MASTER_PORT" in message
