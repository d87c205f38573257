"""Links in the places that a run writes to: what they name is another's, and stays as it is."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from kernels.ssd.tiles import write_tiles
from pretrain.bad_steps import record_event
from pretrain.evaluation.pictures import _save
from pretrain.run_dir import start_log
from slurm.jobs import JobLog
from slurm.preflight import _write
from untrusted.errors import UnsafeFileError

CONTENT = "of another"


def log_of_rank(run_dir: Path) -> None:
    with pytest.raises(UnsafeFileError, match="is a link, not a file; remove it"):
        start_log(run_dir, 0)


def event(run_dir: Path) -> None:
    record_event(run_dir, "start", step=1)


def preflight(run_dir: Path) -> None:
    _write(run_dir, [], {})


def picture(run_dir: Path) -> None:
    _save(plt.figure(), run_dir / "by_position.png")


def tiles(run_dir: Path) -> None:
    write_tiles(run_dir / "tiles.json", {})


def job(run_dir: Path) -> None:
    with pytest.raises(UnsafeFileError, match="is a link, not a file; remove it"):
        JobLog(run_dir).check_writable()


@pytest.fixture
def log() -> Iterator[None]:
    """Take the run's handlers away again."""
    yield
    for handler in list(logging.getLogger("transxssm").handlers):
        logging.getLogger("transxssm").removeHandler(handler)
        handler.close()


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (log_of_rank, "logs/rank-0.log"),
        (event, "events.jsonl"),
        (preflight, "preflight.json"),
        (picture, "by_position.png"),
        (tiles, "tiles.json"),
        (job, "jobs.jsonl"),
    ],
)
@pytest.mark.usefixtures("log")
def test_what_a_link_names_is_not_written(
    write: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text(json.dumps({"job_id": "1"}) if write is job else CONTENT)
    before = (tmp_path / "precious").read_text()
    for place in (name, f"{name}.tmp", f".{Path(name).name}.tmp"):
        link = tmp_path / "run" / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / "precious")
    write(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == before
