"""Nothing that a submission and a run leave behind has a credential in it, and the run has them."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain import credentials, failure
from pretrain.cli import app
from pretrain.config import load_config
from pretrain.run_dir import start_log
from pretrain.sources import open_blend
from tests.pretrain.command import paragraph, read_metrics, run_command, write_config
from untrusted.errors import UntrustedError

SECRET = "hunter2"
# streaming takes the rest of a file:// URL as a path
TRAIN, VALIDATION = f"{SECRET}@host/train", f"host?sig={SECRET}&x=1/validation"
SBATCH = """#!/bin/bash
cp "$2" "$SPOOL/script"
env -0 >"$SPOOL/environment"
echo 7
"""


@pytest.fixture
def folder(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where things are submitted from; its data is at file:// URLs with credentials."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").mkdir()
    for url in (TRAIN, VALIDATION):
        (tmp_path / url).parent.symlink_to(tiny_data)
    for name, script in (("sbatch", SBATCH), ("squeue", "#!/bin/bash\n")):
        (tmp_path / "outside" / name).write_text(script)
        (tmp_path / "outside" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'outside'}:{os.environ['PATH']}")
    monkeypatch.setenv("SPOOL", str(tmp_path / "outside"))
    cluster = tmp_path / "outside/cluster.toml"
    cluster.write_text(f'gpus_per_node = 0\nenvironment.NOTHING_SPECIAL = "{SECRET}"')
    monkeypatch.setenv("TRANSXSSM_CLUSTER", str(cluster))
    return tmp_path


def write_secret_config(folder: Path, tiny_data: Path) -> Path:
    logging_ = {
        "run_dir": "runs/a", "tensorboard": True, "wandb_project": "tests",
        "prometheus_file": str(folder / "run.prom"),
    }  # fmt: skip
    urls = {
        "train": f"file://{TRAIN}", "validation": f"file://{VALIDATION}",
        "cache_dir": str(folder / "cache"), "download_attempts": 1,
    }  # fmt: skip
    training = {"steps": 4}
    config = write_config(folder / "w", tiny_data, training=training, data=urls, logging=logging_)
    return config.rename(folder / "outside/config.toml")


def live(folder: Path, **environment: str) -> None:
    """In each rank, before the command."""
    os.chdir(folder)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_API_KEY": f"{SECRET:x<40}"}
    os.environ |= {"SLURM_JWT": SECRET, "SLURM_JOB_ID": "7", **environment}


def with_secret(folder: Path) -> Iterator[Path]:
    """The files and folders in whose names or content the secret is."""
    for path in folder.rglob("*"):
        if path.is_relative_to(folder / "outside") or path.is_symlink():
            continue
        if SECRET in path.name or (path.is_file() and SECRET.encode() in path.read_bytes()):
            yield path


def test_a_submission_and_a_run_leave_no_credentials(folder: Path, tiny_data: Path) -> None:
    config = write_secret_config(folder, tiny_data)
    outputs = []

    def command(*words: str | Path, code: int = 0, **environment: str) -> None:
        (end,) = run_command(*words, before=partial(live, folder, **environment))
        assert end.code == code, end.output
        outputs.append(end.output)

    def printed(*words: str | Path) -> None:
        result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        outputs.append(result.output)

    printed("submit", config, "--nodes", "1")
    assert not list(with_secret(folder))
    submitted = (folder / "outside/environment").read_text().split("\0")
    environment = dict(entry.split("=", 1) for entry in submitted if entry)
    assert environment["NOTHING_SPECIAL"] == SECRET
    given = {credentials.VARIABLE: environment[credentials.VARIABLE]}

    run_dir = folder / "runs/a"
    command("pretrain", run_dir / "config.toml", **given)
    longer = ("--training.steps=6", f"--data.train=file://{TRAIN}")
    command("pretrain", config, *longer)  # which goes on
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    events = (run_dir / "events.jsonl").read_text()
    assert "begins after step 4" in events
    command(
        "pretrain", config, *longer, f"--data.validation=file://user:{SECRET}@host/none", code=1
    )
    assert "file://***@host/none" in paragraph(outputs[-1])
    with pytest.raises(UntrustedError, match=credentials.VARIABLE):
        open_blend(load_config(run_dir / "config.toml"))
    command("checkpoint", "export", run_dir, folder / "model")
    evaluated = ("--data", f"file://{VALIDATION}", "--limit", "2", "--out", folder / "evaluation")
    command("evaluate", run_dir, *evaluated, TMPDIR=str(folder))
    for words in (("status",), ("logs", "--rank", "0"), ("report",), ("checkpoint", "inspect")):
        printed(*words, run_dir)
    printed("runs", folder, "--json")
    assert not list(with_secret(folder))
    assert not [output for output in outputs if SECRET in output]
    assert "***@host" in (run_dir / "config.toml").read_text()
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert list(run_dir.glob("tensorboard/*"))


def test_the_record_of_a_configuration(
    folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_secret_config(folder, tiny_data)
    loaded = load_config(config)
    (record := folder / "record.toml").write_text(credentials.dump_recorded(loaded))
    assert SECRET not in record.read_text()
    (given,) = credentials.environment_of_job(loaded).values()
    monkeypatch.setenv(credentials.VARIABLE, given)
    assert load_config(record) == loaded
    other = load_config(record, ["--data.train=s3://bucket/other"])
    assert other.data.train == "s3://bucket/other"
    other = load_config(config, ["--data.train", f"file://changed-{TRAIN}"])
    assert other != loaded
    assert credentials.recorded(other) == credentials.recorded(loaded)  # so a run goes on
    monkeypatch.setenv(credentials.VARIABLE, given[:-1])
    with pytest.raises(UntrustedError, match="CREDENTIALS is damaged; submit") as caught:
        load_config(record)
    assert SECRET not in str(caught.value)


def test_logs_have_no_credentials_and_no_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("transxssm")
    try:
        start_log(tmp_path, 0)
        try:
            raise OSError(f"user:{SECRET}@host gave no answer, and /x?sig={SECRET} none, either")
        except OSError:
            log.exception("sftp://user:%s@host/a\x1b]0;title\x07", SECRET)
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
    failure.announce(tmp_path / "logs", f"https://{SECRET}@host \x1b[2J", 0.0)
    for text in (
        (tmp_path / "logs/rank-0.log").read_text(),
        (tmp_path / "logs" / failure.FILE).read_text(),
        capsys.readouterr().err,
    ):
        assert SECRET not in text
        assert "\x1b" not in text
        assert "://***@host" in text
