"""Jobs that hang or lose a rank: ended in time, with the rank and its host named."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from parallel.launch import host_name
from pretrain.watchdog import HUNG
from tests.pretrain.command import at_step, paragraph, run_command, write_config

SIXES: dict[str, Any] = {"global_batch_size": 6, "micro_batch_size": 1}


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long() -> None:
    time.sleep(600)


def test_stopped_rank_is_named_and_the_others_write_their_stacks(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, training=SIXES | {"hang_timeout": 2})
    before = partial(at_step, 3, 1, stop_itself)
    ends = run_command("pretrain", config, ranks=3, before=before, kill_after=20)
    assert [end.code for end in ends] == [HUNG, -signal.SIGKILL, HUNG]
    (said,) = {line for e in ends for line in e.output.splitlines() if line.startswith("error: ")}
    assert "no progress for" in said
    assert f"rank 1 on {host_name()} does not answer" in said
    assert "at step 3: forward_backward, all_reduce from parallel/schedule.py" in said
    assert said == "error: " + (tmp_path / "run/logs/first_failure.txt").read_text()
    for rank in (0, 2):
        stacks = (tmp_path / f"run/logs/rank-{rank}.log").read_text()
        assert "in count_tokens" in stacks
        assert "does not answer" in stacks


def test_ranks_that_wait_for_each_other_are_told_apart(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, training={"hang_timeout": 2})
    ends = run_command("pretrain", config, ranks=2, before=partial(at_step, 2, 0, sleep_long))
    assert [end.code for end in ends] == [HUNG, HUNG]
    said = (tmp_path / "run/logs/first_failure.txt").read_text()
    assert f"rank 0 on {host_name()} at step 2: forward_backward, sleep_long from" in said
    assert f"rank 1 on {host_name()} at step 2: forward_backward, all_reduce from" in said
    for rank, function in ((0, "in sleep_long"), (1, "in count_tokens")):
        assert function in (tmp_path / f"run/logs/rank-{rank}.log").read_text()


def test_killed_rank_is_named_by_the_others(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, training=SIXES)
    ends = run_command("pretrain", config, ranks=3, before=partial(at_step, 3, 2, kill_itself))
    assert [end.code for end in ends] == [1, 1, -signal.SIGKILL]
    for end in ends[:2]:
        assert f"rank 2 on {host_name()} ended without a word" in paragraph(end.output)
        assert end.seconds < 20
    told = (tmp_path / "run/logs/first_failure.txt").read_text()
    assert told.split(": ", 1)[1].startswith("rank 2"), "and nobody else"


def test_job_whose_first_rank_was_killed_says_so(tiny_data: Path, tmp_path: Path) -> None:
    """It holds the job's store."""
    config = write_config(tmp_path, tiny_data)
    ends = run_command("pretrain", config, ranks=2, before=partial(at_step, 3, 0, kill_itself))
    assert [end.code for end in ends] == [-signal.SIGKILL, 1]
    assert f"rank 0 on {host_name()}, which holds the job's store" in paragraph(ends[1].output)
