"""Short runs of the `transxssm` command in tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command import Ended as Ended
from benchmarks.command import read_metrics as read_metrics
from benchmarks.command import run_command as run_command
from pretrain.config import dump_config
from tests.tiny import tiny_config


def write_config(folder: Path, data: Path, /, **sections: dict[str, Any]) -> Path:
    """A TOML file of a short run on prepared data, whose run directory is folder/run."""
    training = {"steps": 6, "global_batch_size": 4, "eval_every": 3, "eval_batches": 1}
    sections["training"] = training | sections.get("training", {})
    sections["checkpoint"] = {"every": 2} | sections.get("checkpoint", {})
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text(dump_config(tiny_config(data, folder / "run", **sections)))
    return path


def succeed(*words: str | Path, ranks: int = 1) -> None:
    """`transxssm WORDS`, which must end with 0 on every rank."""
    for end in run_command(*words, ranks=ranks):
        assert end.code == 0, end.output


def paragraph(output: str) -> str:
    """The error that the command printed: one line beginning with "error: ", no traceback."""
    assert "Traceback" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    return errors[0]


def at_step(step: int, only_rank: int, act: Callable[[], None]) -> None:
    """`act` as the step's forward begins, on one rank."""
    from pretrain import trainer

    if os.environ.get("RANK", "0") != str(only_rank):
        return
    calls = [0]
    count_tokens = trainer.count_tokens

    def counted(*words: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            act()
        return count_tokens(*words)

    trainer.count_tokens = counted
