"""A server that imports slow packages once and forks a pytest process for every request.

    python -P benchmarks/warm_pytest.py MODULE...

Imports the named modules (of others: nothing of the tree whose tests are run), writes a line, and
reads requests, one JSON object a line:

    folder      the tree: working directory, first on the import path, also of processes started
    tmp         TMPDIR
    arguments   of pytest
    limit       seconds, after which the process and what it started in its session is killed
    result      where {"failed": [node ids], "strays": [files]} is written; strays are
                modules that the process loaded from another copy of the tree's packages
    log         where stdout and stderr go

Answers each with {"code": exit code of pytest, or null where the time was up}.

Ranks that tests fork from Python's fork server come from a process that has the same modules: it is
forked from here too, before the tests begin, and becomes the fork server when one is wanted.
"""

import contextlib
import fcntl
import importlib
import json
import multiprocessing.util
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLOSED = 200  # descriptors from here on are free in a fresh process


class Recorder:
    """A plugin that keeps what became of the tests."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of every phase of a test."""
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        """Of every file and class."""
        if report.failed:
            self.failed.append(report.nodeid)


def serve() -> None:
    """Answer requests until stdin ends."""
    importlib.import_module("pytest")
    for name in sys.argv[1:]:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request)
        print(json.dumps({"code": _wait(child, request["limit"])}), flush=True)


def _wait(child: int, limit: float) -> int | None:
    """Exit code of a child, or None where it was killed; nothing of its session is left."""
    end = time.monotonic() + limit
    pid = 0
    try:
        while not pid and time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left in the group
            os.killpg(child, signal.SIGKILL)
    if not pid:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def _run(request: dict[str, Any]) -> None:
    """Run pytest in this process, a fresh fork, and end."""
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        folder = request["folder"]
        os.chdir(folder)
        sys.path.insert(0, folder)
        sys.argv = ["pytest", *request["arguments"]]
        os.environ |= {"PYTHONPATH": folder, "TMPDIR": request["tmp"]}
        # examples that failed under another mutant are not this one's
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{request['tmp']}/hypothesis"
        tempfile.tempdir = None
        del sys.modules["__main__"].__file__  # else every rank would run it again
        _prepare_fork_server()
        recorder = Recorder()
        pytest = sys.modules["pytest"]
        code = int(pytest.main(request["arguments"], plugins=[recorder]))
        result = {"failed": recorder.failed, "strays": _strays(folder)}
        Path(request["result"]).write_text(json.dumps(result))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _strays(folder: str) -> list[str]:
    """Files of loaded modules whose package stands in the folder, but which do not."""
    packages = {path.parent.name for path in Path(folder).glob("*/__init__.py")}
    files = {
        str(module.__file__)
        for name, module in sys.modules.items()
        if name.partition(".")[0] in packages and getattr(module, "__file__", None)
    }
    return sorted(file for file in files if not file.startswith(folder + "/"))


def _prepare_fork_server() -> None:
    """Fork the process that becomes multiprocessing's fork server once that is started."""
    ours, theirs = socket.socketpair()
    template = os.fork()
    if template == 0:
        ours.close()
        _become_fork_server(theirs)
    theirs.close()
    spawn = multiprocessing.util.spawnv_passfds
    waiting = [template]

    def spawn_or_wake(path: Any, args: Sequence[Any], fds: Sequence[int]) -> int:
        command = os.fsdecode(args[-1])
        if not waiting or "multiprocessing.forkserver" not in command:
            return spawn(path, args, fds)
        numbers = [int(fd) for fd in fds]
        message = json.dumps([command, numbers, dict(os.environ)]).encode()
        socket.send_fds(ours, [len(message).to_bytes(8, "little")], numbers)
        ours.sendall(message)
        ours.close()
        return waiting.pop()

    multiprocessing.util.spawnv_passfds = spawn_or_wake  # type: ignore[assignment]


def _become_fork_server(wake: socket.socket) -> None:
    """Wait for the command of a fork server and its descriptors; run it under their numbers."""
    code = 70
    try:
        size, received, _, _ = socket.recv_fds(wake, 8, 16)
        if size:
            with wake.makefile("rb") as stream:
                command, numbers, environment = json.loads(
                    stream.read(int.from_bytes(size, "little"))
                )
            os.environ.clear()
            os.environ.update(environment)
            moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, CLOSED) for fd in received]
            for fd, number in zip(moved, numbers, strict=True):
                os.dup2(fd, number)
                os.close(fd)
            exec(command, {})
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
