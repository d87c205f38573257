"""A job array that tokenises, with one of its processes killed."""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.slurm_cluster import Cluster
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from tests.tiny import write_text

ROOT = Path(__file__).parents[2]


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def process_of_task(job_id: str, task: int) -> int | None:
    """The pid, here, of an array task's `transxssm prepare`."""
    wanted = (f"SLURM_ARRAY_JOB_ID={job_id}", f"SLURM_ARRAY_TASK_ID={task}")
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        if b"prepare" in words and all(name in environment for name in wanted):
            return int(folder.name)
    return None


def test_array_with_a_killed_task_writes_what_one_process_does(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_text(tmp_path / "text", 200_000)
    train_tokenizer([tmp_path / "text"], tmp_path / "tokenizer", 300)
    prepare([tmp_path / "text"], tmp_path / "tokenizer", tmp_path / "alone", 64)
    job = cluster.sbatch(
        "--array=3-5", "--cpus-per-task=1", f"--chdir={tmp_path}", ROOT / "slurm/prepare.sbatch",
        "text", "--out", "together", "--tokenizer", "tokenizer", "--seq-len", "64",
        cwd=tmp_path, env={"TRANSXSSM": str(Path(sys.executable).with_name("transxssm"))},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while (victim := process_of_task(job, 4)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(victim, signal.SIGKILL)
    log = tmp_path / f"transxssm-prepare-{job}.log"
    while "== share merge: ended with" not in (text := log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    assert "== share 2/3: killed (137) in attempt 1" in text
    assert "== share merge: ended with 0" in text
    assert hashes(tmp_path / "together") == hashes(tmp_path / "alone")
