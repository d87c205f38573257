"""A folder with everything that the product reads, made once and copied for every case."""

import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_process import Limits, in_a_process, run_forked
from pretrain.config import dump_config, parse_config

OLD_FORMAT = Path(__file__).parents[1] / "tests/checkpoints_tools/format2.tar.gz"
MODEL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 8, "state_dim": 16, "ssd_groups": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1,
}  # fmt: skip
TREE: dict[str, Any] = {
    "model": MODEL,
    "parallel": {},
    "data": {"train": "data/train", "validation": "data/validation", "seq_len": 64,
             "cache_dir": "../home/cache"},
    "optimizer": {"lr": 1e-3, "eps": 1e-5},
    "training": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "dtype": "fp32",
                 "eval_every": 3, "eval_batches": 1},
    "checkpoint": {"every": 2, "keep_last": 2},
    "logging": {"run_dir": "run"},
}  # fmt: skip
"""The configuration of the run in the folder, whose paths are relative."""
COMMANDS = (
    "tokenizer train text --out tokenizer --vocab-size 300",
    "prepare text --out data --tokenizer tokenizer --seq-len 64 --validation-fraction 0.3",
    "prepare text --out data-zstd --tokenizer tokenizer --seq-len 64 --compression zstd",
    "prepare text --out data-tar --tokenizer tokenizer --seq-len 64 --format webdataset",
    "prepare text --out begun --tokenizer tokenizer --seq-len 64 --shard 1/2 --workers 1",
    "pretrain config.toml",
    "pretrain config.toml --logging.run_dir ../home/warm --data.train data-zstd/train"
    " --training.steps 1",
    "checkpoint export run model --no-verify --max-shard-size 40KB",
)
SHORT = (COMMANDS[0], COMMANDS[1], COMMANDS[5], COMMANDS[7])
"""Enough for most commands."""
SQUEUE = ((64, "41"), (32, "RUNNING"), (256, "n[1-2]"), (32, "0"), (32, "1:00:00"), (128, "None"))


def prepare(folder: Path, commands: Sequence[str] = COMMANDS) -> None:
    """Make FOLDER/work, home and tmp. Raises RuntimeError where a command fails."""
    work = folder / "work"
    for name in ("work/text", "work/bin", "work/slurm", "home", "tmp"):
        (folder / name).mkdir(parents=True)
    in_a_process(lambda: _write_text(work / "text"))
    (work / "config.toml").write_text(dump_config(parse_config(TREE)))
    for words in commands:
        ended = run_forked(words.split(), folder, Limits(seconds=300))
        if ended.code or ended.broken:
            output = ended.output.decode(errors="replace")
            raise RuntimeError(f"transxssm {words}: {ended.code} {ended.broken}\n{output}")
    shutil.rmtree(folder / "home/warm", ignore_errors=True)
    if OLD_FORMAT.exists():
        with tarfile.open(OLD_FORMAT) as archive:
            archive.extractall(work / "old", filter="data")
    _plant_records(work)
    _plant_slurm(work)


def copy(base: Path, folder: Path) -> None:
    """Copy a prepared folder, and what its records say of its place."""
    for name in ("work", "home"):
        shutil.copytree(base / name, folder / name, symlinks=True)
    (folder / "tmp").mkdir()
    record = folder / "work/run/checkpoints.json"
    record.write_text(record.read_text().replace(str(base), str(folder)))


def _write_text(folder: Path) -> None:
    random_ = np.random.default_rng(0)
    words = [f"w{n:x}" for n in range(300)]
    texts = [" ".join(random_.choice(words, 120)) for _ in range(60)]
    for n, text in enumerate(texts[:20]):
        (folder / f"{n:02d}.txt").write_text(text)
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts[20:40])
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    parquet.write_table(pa.table({"text": texts[40:]}), folder / "rows.parquet")


def _plant_records(work: Path) -> None:
    """What runs leave behind that nothing has happened to did not."""
    run = work / "run"
    (run / "jobs.jsonl").write_text('{"job_id": "41", "submitted": "2026-01-01T00:00:00+0000"}\n')
    (run / "job-41.log").write_text("step 1\nstep 2\n")
    (run / "logs/first_failure.txt").write_text("rank 1 on n2: out of memory\n")
    (run / "skipped_windows.json").write_text("[[4, 8]]")
    (run / "preflight.json").write_text(json.dumps({"bad_nodes": {"n2": ["it is slow"]}}))
    with (run / "events.jsonl").open("a") as file:
        for event in ("skipped", "rollback", "straggler"):
            file.write(json.dumps({"event": event, "time": "t", "step": 3, "said": "x"}) + "\n")
    (work / "cluster.toml").write_text(
        'partition = "main"\ntime = "1:00:00"\ngpus_per_node = 0\nsbatch = ["--exclusive"]\n'
        '[environment]\nNCCL_DEBUG = "WARN"\n'
    )


def _plant_slurm(work: Path) -> None:
    """Slurm's commands, which print what is in files."""
    row = "".join(value.ljust(width) for width, value in SQUEUE)
    (work / "slurm/squeue").write_text(f"{row}\n")
    (work / "slurm/sbatch").write_text("42\n")
    (work / "slurm/scancel").write_text("\n")
    for name in ("squeue", "sbatch", "scancel"):
        program = work / "bin" / name
        answer = f'"${{0%/*}}/../slurm/{name}"'
        program.write_text(f"#!/bin/sh\n[ ! -f {answer} ] || head -c 100000 {answer}\n")
        program.chmod(0o755)
