"""Job scripts take every value as data, and Slurm's answers are not believed."""

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.config import load_config
from slurm.cluster import ClusterConfig
from slurm.script import SCRIPT, Request, job_script
from tests.conftest import missing
from tests.pretrain.command import write_config

STRANGE = [
    " --array=1-3", 'a" --array=1-3 "', "a' --array=1-3 # b", "#SBATCH --array=1-3",
    "a\\ --array=1-3", "$(touch PWNED)`touch PWNED`", "a}; touch PWNED; {",
]  # fmt: skip
BREAKING = [
    "a\ntouch PWNED\n", "a\n#SBATCH --array=1-3", "a\rb", "a\x00b", "a\x1b[31m", "a\x85b",
    "a\u2028b", "a\x7f",
]  # fmt: skip
PROGRAMS = {
    # keeps the script and its environment as Slurm does, and runs the body where it was submitted
    "sbatch": 'cp "$2" "$SPOOL/script"; env -0 >"$SPOOL/environment"\n'
    "SLURM_JOB_NUM_NODES=1 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node1 SLURM_NTASKS_PER_NODE=1 "
    'TRANSXSSM=program bash "$SPOOL/script" >"$SPOOL/output" 2>&1 && echo 7\n',
    "scontrol": "echo node1 NodeAddr=node1 ",
    "squeue": "[[ $* == *--jobs* ]] && echo RUNNING; exit 0\n",
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"\n',
    "program": 'printf "%s\\n" "$*" >>"$SPOOL/ran"; echo "$TRITON_CACHE_DIR" >>"$SPOOL/cache"\n'
    'mkdir -p "$TRITON_CACHE_DIR"; stat -c %a "${TRITON_CACHE_DIR%/*}" >>"$SPOOL/mode"\n',
    "find": "",
}


class Site:
    """A place to submit from, whose sbatch runs what it is given at once."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.spool = folder, folder / "spool"
        self.spool.mkdir()
        self.program("sbatch", PROGRAMS["sbatch"])
        for name, body in PROGRAMS.items():
            self.program(name, body)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("SPOOL", str(self.spool))
        monkeypatch.setenv("TRANSXSSM_CLUSTER", str(folder / "cluster.toml"))
        monkeypatch.delenv("TRANSXSSM", raising=False)
        self.cluster("")

    def program(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)

    def cluster(self, text: str) -> None:
        (self.folder / "cluster.toml").write_text(f"gpus_per_node = 0\n{text}\n", "utf-8")

    def submit(self, config: Path, *words: str) -> Any:
        """The command's result, or the error that ends it."""
        for path in self.spool.iterdir():
            path.unlink()
        return CliRunner().invoke(app, ["submit", str(config), "--nodes", "1", *words])

    def options(self) -> list[str]:
        """What Slurm reads in the script that was submitted."""
        text = (self.spool / "script").read_text("utf-8")
        return [word for line in directives(text) for word in slurm_words(line)]

    def environment(self) -> dict[str, str]:
        """That the script was submitted in."""
        entries = (self.spool / "environment").read_text("utf-8").split("\0")
        return dict(entry.split("=", 1) for entry in entries if entry)


def directives(script: str) -> list[str]:
    """The rest of each #SBATCH line before the first command, as sbatch takes them."""
    found = []
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            found.append(line.removeprefix("#SBATCH"))
        elif line and not line.startswith("#"):
            break
    return found


def slurm_words(line: str) -> list[str]:
    """The options in a line, as _get_argument of Slurm's sbatch splits it."""
    words, place = [], 0
    while True:
        while place < len(line) and line[place].isspace():
            place += 1
        word, quote, escaped = "", "", False
        begin = place
        while place < len(line) and (quote or not line[place].isspace()):
            letter = line[place]
            if escaped:
                word, escaped = word + letter, False
            elif letter == "\\":
                escaped = True
            elif quote and letter == quote:
                quote = ""
            elif not quote and letter in "\"'":
                quote = letter
            elif not quote and letter == "#":
                return words + ([word] if word else [])
            else:
                word += letter
            place += 1
        assert not quote, f"unmatched {quote} in {line}"
        if place == begin:
            return words
        words.append(word)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path, monkeypatch)


@pytest.fixture
def config(site: Site, tiny_data: Path) -> Path:
    return write_config(site.folder / "configs", tiny_data, logging={"run_dir": "runs/a"})


def toml(text: str) -> str:
    return json.dumps(text).replace("\x7f", "\\u007f")


def in_folder(site: Site, config: Path, value: str) -> Any:
    """Submit from a folder of this name."""
    folder = site.folder / value.replace("/", "_")
    folder.mkdir()
    os.chdir(folder)
    return site.submit(config)


def by_config_name(site: Site, config: Path, value: str) -> Any:
    copy = config.with_name(value.replace("/", "_"))
    copy.write_text(config.read_text())
    return site.submit(copy)


def by_option(name: str) -> Callable[[Site, Path, str], Any]:
    def submit(site: Site, config: Path, value: str) -> Any:
        return site.submit(config, f"--{name}={value}")

    return submit


def by_cluster(line: str) -> Callable[[Site, Path, str], Any]:
    def submit(site: Site, config: Path, value: str) -> Any:
        site.cluster(line.replace("VALUE", toml(value)))
        return site.submit(config)

    return submit


FIELDS = {
    **{n: by_option(n) for n in ("partition", "account", "qos", "constraint", "exclude", "after",
                                 "time", "nodes")},
    "environment SBATCH_*": by_cluster("[environment]\nSBATCH_ARRAY_INX = VALUE"),
    **{f"cluster {n}": by_cluster(f"{n} = VALUE") for n in ("partition", "time")},
    "cluster sbatch": by_cluster("sbatch = [VALUE]"),
    "environment name": by_cluster("[environment]\nVALUE = 'x'"),
}  # fmt: skip
FREE_FIELDS = {
    "logging.run_dir": by_option("logging.run_dir"),
    "the working directory": in_folder,
    "environment A": by_cluster("[environment]\nA = VALUE"),
    "sbatch": lambda site, config, value: by_cluster("sbatch = [VALUE]")(
        site, config, f"--comment={value}"
    ),
    "configuration's name": by_config_name,
}


def refused(result: Any, value: str) -> bool:
    """Whether it ended with a sentence that names the value."""
    if result.exit_code == 0:
        return False
    message = str(result.exception)
    assert type(result.exception).__name__ in ("SlurmError", "ConfigError"), result.exception
    assert message.isprintable()
    return True


@pytest.mark.parametrize("field", FIELDS)
def test_fields_with_a_grammar_refuse_strange_values(field: str, site: Site, config: Path) -> None:
    for value in [*STRANGE, *BREAKING]:
        assert refused(FIELDS[field](site, config, value), value), (field, value)
        assert not list(site.spool.iterdir())
    assert not list(site.folder.rglob("PWNED"))


@pytest.mark.parametrize("field", FREE_FIELDS)
def test_other_fields_arrive_as_they_are(field: str, site: Site, config: Path) -> None:
    submit = FREE_FIELDS[field]
    submit(site, config, "plain")
    count = len(site.options())
    for value in [*STRANGE, "é %j"]:
        os.chdir(site.folder)
        result = submit(site, config, value)
        if "\\" in value and field in ("logging.run_dir", "the working directory"):
            assert refused(result, value)
            continue
        assert result.exit_code == 0, (value, result.exception)
        options = dict(word.partition("=")[::2] for word in site.options())
        assert len(options) == len(site.options()) == count
        assert "--array" not in options
        run_dir = site.folder / "runs/a"
        if field == "logging.run_dir":
            run_dir = site.folder / value
            assert options["--job-name"] == run_dir.name
        if field == "the working directory":
            folder = site.folder / value.replace("/", "_")
            assert options["--chdir"] == str(folder)
            run_dir = folder / "runs/a"
        assert options["--output"].replace("%%", "%") == f"{run_dir}/job-%j.log"
        if field == "sbatch":
            assert options["--comment"] == value
        if field == "environment A":
            assert site.environment()["A"] == value
            assert value not in (site.spool / "script").read_text()
        ran = (site.spool / "ran").read_text().splitlines()
        assert ran == [f"{word} {run_dir}/config.toml" for word in ("preflight", "pretrain")]
    assert not list(site.folder.rglob("PWNED"))


@pytest.mark.parametrize("field", [f for f in FREE_FIELDS if f != "configuration's name"])
def test_other_fields_refuse_control_characters(field: str, site: Site, config: Path) -> None:
    for value in BREAKING:
        if "\x00" in value and field == "the working directory":
            continue
        os.chdir(site.folder)
        result = FREE_FIELDS[field](site, config, value)
        assert refused(result, value), value
        assert field.split()[-1] in str(result.exception)
        assert not list(site.spool.iterdir())


def test_scripts_are_their_owner_s(site: Site, config: Path) -> None:
    script = site.folder / "runs/a/job.sbatch"
    script.parent.mkdir(parents=True)
    script.write_text("of an earlier version")
    assert site.submit(config).exit_code == 0
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    assert load_config(script.with_name("config.toml")) == load_config(config)


@pytest.mark.parametrize("kind", ["absent", "own", "link", "open", "file", "other's"])
def test_caches_of_kernels_are_in_a_folder_of_this_user_alone(
    kind: str, site: Site, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others can guess its name, and make it first."""
    monkeypatch.setenv("TMPDIR", str(site.folder / "tmp"))
    planted, victim = site.folder / "tmp/transxssm-cache-7", site.folder / "victim"
    (victim / "triton").mkdir(parents=True)
    (victim / "triton/kept").touch()
    planted.parent.mkdir(0o777)
    if kind == "link":
        planted.symlink_to(victim)
    elif kind == "file":
        planted.touch()
    elif kind != "absent":
        planted.mkdir(0o700)
        planted.chmod(0o777 if kind == "open" else 0o700)
        if kind == "other's":
            if os.geteuid():
                missing("only root can give a folder to another user")
            os.chown(planted, 12345, 12345)
    assert site.submit(config).exit_code == 0
    used = {Path(line) for line in (site.spool / "cache").read_text().split()}
    assert len(used) == 1
    assert (used == {planted / "triton"}) == (kind in ("absent", "own"))
    assert set((site.spool / "mode").read_text().split()) == {"700"}
    assert not used.pop().parent.exists()
    assert (victim / "triton/kept").exists()


@pytest.mark.parametrize("answer", ["", "echo Submitted batch job"])
def test_shares_whose_merging_is_not_submitted(answer: str, site: Site) -> None:
    site.program("sbatch", answer)
    shares = {
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_COUNT": "2",
    }
    done = subprocess.run(
        ["bash", SCRIPT.with_name("prepare.sbatch"), "corpus"], capture_output=True, text=True,
        env=os.environ | shares | {"SLURM_ARRAY_JOB_ID": "7", "TRANSXSSM": "program"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "in place of the number of a job" in done.stdout
    assert not (site.spool / "ran").exists()


def test_names_longer_than_a_file_s_are_refused(site: Site, config: Path) -> None:
    for run_dir in ("runs/" + 300 * "a", "runs/" + 2500 * "a/" + "b"):
        assert refused(site.submit(config, f"--logging.run_dir={run_dir}"), run_dir)


@pytest.mark.parametrize(
    ("answer", "printed"),
    [("", "nothing"), ("echo", "nothing"), ("echo Submitted", "'Submitted'"), ("echo 0", "'0'"),
     (r"printf '\377\376'", "'��'"), ("echo 12 34", "'12 34'"), ("echo 12x", "'12x'"),
     (r"printf '\033[2J'", r"'\x1b[2J'"), ("yes | head -c 10000", "'y")],
)  # fmt: skip
def test_sbatch_without_a_number_is_no_success(
    answer: str, printed: str, site: Site, config: Path
) -> None:
    site.program("sbatch", answer)
    result = site.submit(config)
    assert refused(result, answer)
    assert f"printed {printed}" in str(result.exception)
    assert not (site.folder / "runs/a/jobs.jsonl").exists()


def test_sbatch_of_a_cluster_among_several(site: Site, config: Path) -> None:
    site.program("sbatch", "echo '42;blue'")
    assert "job 42:" in site.submit(config).output


@pytest.mark.parametrize("command", ["squeue", "sbatch"])
def test_messages_that_are_not_utf_8(command: str, site: Site, config: Path) -> None:
    site.program(command, r"printf '\033]0;x\007\377\n' >&2; exit 1")
    result = site.submit(config)
    assert refused(result, command)
    assert r"\x1b]0;x\x07�" in str(result.exception)


@pytest.mark.parametrize("answer", ["echo hello", r"printf '\377\n'", r"printf '\033[2J 7 R\n'"])
def test_squeue_that_lists_no_jobs_is_not_believed(answer: str, site: Site, config: Path) -> None:
    site.program("squeue", answer)
    result = site.submit(config)
    assert refused(result, answer)
    assert "squeue printed" in str(result.exception)
    assert str(result.exception).isprintable()
    listed = CliRunner().invoke(app, ["runs", str(site.folder)])
    assert listed.exit_code == 0
    assert "jobs are not shown: squeue printed" in listed.stderr


def exported(script: str) -> dict[str, str]:
    """What the script's own exports leave in a shell that has `environment`."""
    lines = [line for line in script.splitlines() if line.startswith("export ")]
    shell = "\n".join([*lines[: lines.index("export MASTER_ADDR MASTER_PORT")], "env -0"])
    done = subprocess.run(
        ["bash", "-c", shell], env={"PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


def test_jobs_of_an_array_come_one_after_the_other_and_are_not_requeued(tmp_path: Path) -> None:
    request = Request("2", 8, array=5, after="77", time="1-0")
    script = job_script(request, ClusterConfig(), tmp_path / "run")
    options = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    for option in ("--array=1-5%1", "--dependency=afterany:77", "--nodes=2", "--time=1-0",
                   "--ntasks-per-node=8", "--requeue", "--signal=USR1@180"):  # fmt: skip
        assert f"#SBATCH {option}" in options
    assert [line for line in options if "--output" in line] == [
        f"#SBATCH --output={tmp_path}/run/job-%A.log"
    ]
    assert exported(script)["TRANSXSSM_MAX_REQUEUES"] == "0"
    alone = job_script(Request("2", 8), ClusterConfig(), tmp_path / "run")
    percent = job_script(Request("2", 8), ClusterConfig(), tmp_path / "50%j")
    assert f"#SBATCH --output={tmp_path}/50%%j/job-%j.log\n" in percent
    assert "TRANSXSSM_MAX_REQUEUES" not in exported(alone)
    assert "--array" not in alone


def test_what_the_submitting_shell_exports_wins_over_the_cluster_file(
    site: Site, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.cluster("[environment]\nNCCL_DEBUG = 'INFO'\nNCCL_ALGO = 'Tree'")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    assert site.submit(config).exit_code == 0
    environment = site.environment()
    assert (environment["NCCL_DEBUG"], environment["NCCL_ALGO"]) == ("WARN", "Tree")
