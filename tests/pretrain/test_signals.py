"""Signals from the first line on, and ranks that end with their launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import stop
from tests.pretrain.command import write_config

CODES = {
    signal.SIGUSR1: {stop.REQUEUE},
    signal.SIGTERM: {143, stop.REQUEUE},  # the latter once there is something to save
    signal.SIGINT: {130, stop.REQUEUE},
}
SECONDS_TO_END = 20


def start(words: list[str], **options: object) -> "subprocess.Popen[str]":
    """A process of the command that has come to its first line."""
    script = (
        "import os, sys; from pretrain import __main__ as entry; "
        "os.write(1, b'begun'); entry.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(5) == "begun"
    return process


def end(process: "subprocess.Popen[str]", number: int) -> tuple[int, str]:
    process.send_signal(number)
    _, stderr = process.communicate(timeout=SECONDS_TO_END)
    return process.returncode, stderr


def test_signals_of_the_first_seconds_end_as_those_later(tiny_data: Path, tmp_path: Path) -> None:
    """Several processes at once: the time is spent in the interpreter."""
    config = str(write_config(tmp_path, tiny_data, training={"steps": 10_000, "eval_every": 0}))
    running: list[tuple[subprocess.Popen[str], signal.Signals]] = []
    for number, seconds in [
        (signal.SIGTERM, 0.02), (signal.SIGUSR1, 0.05), (signal.SIGINT, 0.1),
        (signal.SIGTERM, 0.4), (signal.SIGINT, 1.0),
    ]:  # fmt: skip
        run = f"--logging.run_dir={tmp_path / f'run-{len(running)}'}"
        process = start(["pretrain", config, run])
        running.append((process, number))
        time.sleep(seconds)
        process.send_signal(number)
    for process, number in running:
        _, stderr = process.communicate(timeout=SECONDS_TO_END)
        assert process.returncode in CODES[number], stderr
        assert "Traceback" not in stderr
        assert f"stopped by {number.name}" in stderr


SIGNALLED_ITSELF = """
import importlib.abc, os, sys
module, number = sys.argv[1], int(sys.argv[2])

class Signals(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Signals())
from pretrain import __main__ as entry
sys.argv[1:] = sys.argv[3:]
entry.main()
"""


@pytest.mark.parametrize(
    ("module", "number", "command", "code"),
    [
        ("pretrain.stop", signal.SIGTERM, "pretrain", 143),
        ("pretrain.stop", signal.SIGUSR1, "evaluate", stop.REQUEUE),
        ("pretrain.stop", signal.SIGINT, "preflight", 130),
        ("typer", signal.SIGINT, "nodes", 130),
    ],
)
def test_signals_while_the_handlers_own_module_is_imported(
    module: str, number: int, command: str, code: int
) -> None:
    words = [sys.executable, "-c", SIGNALLED_ITSELF, module, str(int(number)), command, "none"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_TO_END)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"stopped by {signal.Signals(number).name}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "number"),
    [(["preflight", "none.toml"], signal.SIGUSR1), (["evaluate", "none"], signal.SIGTERM)],
    ids=["preflight", "evaluate"],
)
def test_other_ranks_commands_listen_too(words: list[str], number: signal.Signals) -> None:
    process = start(words)
    time.sleep(0.05)
    code, stderr = end(process, number)
    assert code in CODES[number] | {1, 2}, stderr  # or it was faster
    assert "Traceback" not in stderr


def test_interrupted_command_is_one_line(tmp_path: Path) -> None:
    """Of any other command: before, and after, its imports."""
    config = tmp_path / "config.toml"
    config.write_text(
        'data = {train = "t", validation = "v"}\ntraining = {global_batch_size = 9216}'
    )
    words = ["estimate", str(config), "--search", "--nodes", "1152", "--model.num_layers=96"]
    for seconds in (0.02, 1.0):
        process = start(words)
        time.sleep(seconds)
        code, stderr = end(process, signal.SIGINT)
        assert code == 130, stderr
        assert len(stderr.strip().splitlines()) <= 1


def test_a_second_interrupt_ends_a_command_as_the_first(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 100_000)
    words = ["tokenizer", "train", str(text), "--out", str(tmp_path / "t"), "--vocab-size", "3000"]
    for pause in (0.0, 0.001, 0.05):
        process = start(words)
        time.sleep(2.0)
        for _ in range(4):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode in (0, 130), stderr
        assert "Traceback" not in stderr


# -- the launcher --------------------------------------------------------------------------------


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in tasks.split()]


@pytest.fixture
def launched(tiny_data: Path, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """torchrun with two ranks of a long run."""
    config = write_config(tmp_path, tiny_data, training={"steps": 100_000, "eval_every": 0})
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "pretrain", "pretrain", str(config)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("moment", ["as-they-start", "in-training"])
def test_ranks_end_with_their_launcher(
    moment: str, launched: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    deadline = time.monotonic() + 60
    while len(ranks := children(launched.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    metrics = tmp_path / "run/metrics.jsonl"
    while moment == "in-training" and not (metrics.exists() and metrics.stat().st_size):
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    launched.kill()
    launched.wait()
    deadline = time.monotonic() + 30  # a rank's imports take seconds
    while alive := [rank for rank in ranks if is_alive(rank)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_rank_without_torchrun_outlives_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, time; from pretrain import stop; stop.listen(); "
        f"time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w')"
    )
    shell = f'{sys.executable} -c "{script}" & sleep 0.3'
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    subprocess.run(["bash", "-c", shell], env=environment, check=True)
    deadline = time.monotonic() + 10
    while not (tmp_path / "alive").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
