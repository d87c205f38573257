"""The whole way from text to a generated sentence, through the commands a user types."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from data_pipeline.tokenizer import train_tokenizer
from tests.pretrain.command import paragraph, run_command

SOURCES = Path(__file__).parents[2] / "data_pipeline"


def run_chain(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """(exit code, standard output, exception) of each command, in one process."""
    from typer.testing import CliRunner

    from pretrain.cli import app

    results = []
    for command in commands:
        result = CliRunner().invoke(app, command)
        error = "" if result.exception is None else repr(result.exception)
        results.append((result.exit_code, result.stdout, error))
    return results


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Standard output of each command, by its name, and the folder they worked in."""
    tmp = tmp_path_factory.mktemp("chain")
    (tmp / "config.toml").write_text(f"""
        [model]
        vocab_size = 300
        hidden_size = 32
        intermediate_size = 64
        num_layers = 2
        num_heads = 2
        num_kv_heads = 1
        head_dim = 16
        state_dim = 16
        ssd_groups = 1
        attn_layer_period = 2
        attn_layer_offset = 1
        [data]
        train = "{tmp}/data/train"
        validation = "{tmp}/data/validation"
        seq_len = 64
        [training]
        steps = 4
        [checkpoint]
        every = 2
        [logging]
        run_dir = "{tmp}/run"
        tensorboard = false
    """)
    generate = ["generate", f"{tmp}/model", "--prompt", "def ", "--temperature", "0", "--json"]
    commands = {
        "tokenizer train": ["tokenizer", "train", str(SOURCES), "--out", f"{tmp}/tokenizer",
                            "--vocab-size", "300"],
        "tokenizer inspect": ["tokenizer", "inspect", f"{tmp}/tokenizer", "--text", "def f():"],
        "prepare": ["prepare", str(SOURCES), "--out", f"{tmp}/data", "--tokenizer",
                    f"{tmp}/tokenizer", "--seq-len", "64", "--validation-fraction", "0.3"],
        "data inspect": ["data", "inspect", f"{tmp}/data"],
        "data verify": ["data", "verify", f"{tmp}/data"],
        "pretrain": ["pretrain", f"{tmp}/config.toml", "--training.eval_every", "2"],
        "checkpoint list": ["checkpoint", "list", f"{tmp}/run"],
        "checkpoint export": ["checkpoint", "export", f"{tmp}/run", f"{tmp}/model"],
        "generate": [*generate, "--max-new-tokens", "6"],
        "generate again": [*generate, "--max-new-tokens", "6"],
    }  # fmt: skip
    (results,) = run_ranks(1, run_chain, list(commands.values()))
    output: dict[str, Any] = {"folder": tmp}
    for name, (code, stdout, error) in zip(commands, results, strict=True):
        assert (code, error) == (0, ""), f"{name}: {stdout}"
        output[name] = stdout
    return output


def test_tokenizer_is_trained_and_inspected(chain: dict[str, Any]) -> None:
    assert (chain["folder"] / "tokenizer/tokenizer.json").exists()
    assert "tokenizer.json" in chain["tokenizer train"]
    for name, value in (("vocab_size", "300"), ("round_trip", "true")):
        assert [name, value] in [line.split() for line in chain["tokenizer inspect"].splitlines()]


def test_prepared_data_is_described_and_sound(chain: dict[str, Any]) -> None:
    for split in ("train", "validation"):
        meta = json.loads((chain["folder"] / f"data/{split}/meta.json").read_text())
        assert f"{meta['samples']:,} sequences" in chain["prepare"]
        assert meta["fingerprint"] in chain["data inspect"]  # not abbreviated
    assert "every shard is sound" in chain["data verify"]


def test_checkpoints_are_listed(chain: dict[str, Any]) -> None:
    rows = [line.split("│") for line in chain["checkpoint list"].splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [(row[1], row[2], row[3]) for row in cells if row[1]] == [
        ("2", "1,024", "1"),
        ("4", "2,048", "1"),
    ]
    assert str(chain["folder"] / "run/checkpoints/step-00000004") in chain["checkpoint list"]


def test_export_and_generation(chain: dict[str, Any]) -> None:
    assert sorted(p.name for p in (chain["folder"] / "model").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "modeling_transxssm.py", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    from pretrain.config import load_config

    parameters = load_config(chain["folder"] / "run/config.toml").model.num_params()["total"]
    assert f"{parameters:,} parameters" in chain["checkpoint export"]
    generated = json.loads(chain["generate"])
    assert generated.keys() == {"prompt_ids", "token_ids", "logprobs", "text"}
    assert len(generated["token_ids"]) == len(generated["logprobs"]) <= 6
    assert all(logprob <= 0 for logprob in generated["logprobs"])
    assert chain["generate again"] == chain["generate"]  # greedy


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["checkpoint", "list", "{tmp}"], "is not a checkpoint"),
        (["checkpoint", "export", "{tmp}", "{tmp}/model"], "is not a checkpoint"),
        (["data", "verify", "{tmp}"], "no prepared data there"),
        (["data", "inspect", "{tmp}/nowhere"], "nowhere"),
        (["tokenizer", "inspect", "{tmp}/nowhere"], "nowhere"),
        (["tokenizer", "train", "{tmp}/nowhere", "--out", "{tmp}/t"], "nowhere"),
        (["generate", "{tmp}/nowhere", "--prompt", "a"], "nowhere"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_a_paragraph(words: list[str], found: str, tmp_path: Path) -> None:
    (end,) = run_command(*[word.format(tmp=tmp_path) for word in words])
    assert end.code == 1
    assert found in paragraph(end.output)


@pytest.mark.parametrize("command", [["tokenizer", "train"], ["prepare", "--tokenizer", "t.json"]])
def test_home_folder_in_the_place_of_output_is_expanded(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands `--out ~/x`, but not `--out=~/x`."""
    from typer.testing import CliRunner

    from pretrain.cli import app

    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("One text of several words.\n" * 100)
    train_tokenizer([Path("text.txt")], Path("t.json"), 258)
    words = ["--validation-fraction=0"] if command[0] == "prepare" else ["--vocab-size=258"]
    end = CliRunner().invoke(app, [*command, "text.txt", "--out=~/made", *words])
    assert end.exit_code == 0, end.output
    assert (tmp_path / "home/made").exists()
    assert not (tmp_path / "~").exists()
    end = CliRunner().invoke(app, [*command, "text.txt", "--out=$NOWHERE/made", *words])
    assert end.exit_code == 2
    assert "the variable NOWHERE is not set" in " ".join(end.output.replace("│", " ").split())


URL = "s3://user:S3cr3t@bucket/x"


@pytest.mark.parametrize(
    "words",
    [["checkpoint", "export", "run", URL], ["checkpoint", "import", "model", URL],
     ["checkpoint", "average", "run", "--out", URL], ["evaluate", "model", "--out", URL],
     ["tokenizer", "train", "text", "--out", URL], ["report", "run", "--out", URL],
     ["kernels", "audit", "--json", URL]],
    ids=lambda words: " ".join(words[:2]),
)  # fmt: skip
def test_output_is_written_to_no_url(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from pretrain.cli import app

    monkeypatch.chdir(tmp_path)
    end = CliRunner().invoke(app, words)
    assert end.exit_code == 2, end.output
    assert "is a URL (s3://...)" in " ".join(end.output.replace("│", " ").split())
    assert "S3cr3t" not in end.output
    assert not list(tmp_path.iterdir())
