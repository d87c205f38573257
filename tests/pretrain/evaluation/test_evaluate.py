"""`transxssm evaluate`: one answer by every route, layouts included; and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from checkpoints_tools.model_folder import load_model
from data_pipeline.dataset import PackedDataset
from data_pipeline.prepare import prepare
from parallel.config import ModelConfig
from pretrain.evaluation.models import ExportedModel, evaluation_layout
from pretrain.evaluation.rows import Row, score_dataset, score_rows
from pretrain.generate import load_tokenizer
from tests.pretrain.command import paragraph, read_metrics, run_command, succeed, write_config

LENGTH = 96
TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/, its export model/, text.jsonl, and tasks/ of the harness."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, tiny_data, training={"eval_every": 6, "eval_batches": 1000})
    succeed("pretrain", config)
    succeed("checkpoint", "export", folder / "run", folder / "model", "--no-verify")
    dataset = PackedDataset(tiny_data / "validation")
    tokenizer = load_tokenizer(folder / "model")
    texts = [tokenizer.decode(dataset[i].tokens.tolist()) for i in range(12)]
    texts += ["a", "ünïcödé \U0001f600 " * 9, "\n".join(texts[:3])]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    questions = [{"question": t[:40], "choices": [t[40:60], t[5:9], " x"]} for t in texts[:8]]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "tasks").mkdir()
    (folder / "tasks/text.yaml").write_text(TASK.format(file=folder / "text.jsonl"))
    (folder / "tasks/choice.yaml").write_text(CHOICE.format(file=folder / "questions.jsonl"))
    return folder


def evaluate(*words: str | Path, ranks: int = 1) -> dict[str, Any]:
    words = ("evaluate", *words, "--max-length", str(LENGTH), "--json")
    first, *others = run_command(*words, ranks=ranks)
    assert first.code == 0, first.output
    assert all(end.code == 0 for end in others)
    return dict(json.loads(first.output.splitlines()[-1]))


def by_hand(trained: Path) -> float:
    """Bits per byte of text.jsonl, a text at a time."""
    model, tokenizer = load_model(trained / "model"), load_tokenizer(trained / "model")
    nats = size = 0.0
    for line in (trained / "text.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode(text).ids]
        for end in [*range(LENGTH, len(ids) - 1, LENGTH), len(ids) - 1]:
            begin = max(0, end - LENGTH)
            new = end - begin if end % LENGTH == 0 else end % LENGTH
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin:end]]))[0, -new:]
            labels = torch.tensor(ids[end - new + 1 : end + 1])
            nats += float(F.cross_entropy(logits, labels, reduction="sum"))
        size += len(text.encode())
    return nats / math.log(2) / size


def test_every_route_gives_the_same(trained: Path, tiny_data: Path) -> None:
    text, data = trained / "text.jsonl", tiny_data / "validation"
    tasks = ("--tasks", "local_text,local_choice", "--include-path", trained / "tasks")
    asked = ("--text", text, "--data", data)
    exported = evaluate(trained / "model", *asked, *tasks)
    assert exported[str(text)]["bits_per_byte"] == pytest.approx(by_hand(trained), abs=1e-5)
    metrics = read_metrics(trained / "run")[-1]
    assert exported[str(data)]["loss"] == pytest.approx(metrics["validation_loss"], abs=1e-5)
    assert exported[str(data)]["bits_per_byte"] == pytest.approx(
        metrics["validation_bits_per_byte"], abs=1e-5
    )
    for entry in exported[str(data)]["by_position"]:
        in_training = metrics[f"validation_loss_from_{entry['begin']}"]
        assert entry["loss"] == pytest.approx(in_training, abs=1e-5)
    split = evaluate(trained / "run", *asked, "--tensor", "2", "--pipeline", "2", ranks=4)
    around = evaluate(trained / "run", *asked, *tasks, "--context", "2", ranks=2)
    bits = exported[str(text)]["bits_per_byte"]
    for found in (exported, around):
        assert found["local_text"]["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
        assert found["local_choice"]["acc"] == exported["local_choice"]["acc"]
    for found in (split, around):
        assert found[str(text)]["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
        for name in ("loss", "bits_per_byte"):
            assert found[str(data)][name] == pytest.approx(exported[str(data)][name], abs=1e-5)
        assert found[str(data)]["accuracy"] == pytest.approx(
            exported[str(data)]["accuracy"], abs=2e-4
        )


def test_checkpoints_that_no_run_saved_are_evaluated(
    trained: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Imported and averaged ones record no layout."""
    data = ("--data", tiny_data / "validation", "--limit", "4")
    steps = sorted((trained / "run/checkpoints").glob("step-*"))[-2:]
    succeed("checkpoint", "average", *steps, "--out", tmp_path / "average")
    succeed("checkpoint", "import", trained / "model", tmp_path / "imported")
    losses = {
        name: evaluate(path, *data, ranks=ranks)[str(tiny_data / "validation")]["loss"]
        for name, path, ranks in (
            ("run", trained / "run", 1),
            ("imported", tmp_path / "imported", 2),
            ("average", tmp_path / "average", 1),
        )
    }
    assert losses["imported"] == pytest.approx(losses["run"], abs=1e-5)
    assert losses["average"] == pytest.approx(losses["run"], abs=0.1)
    assert losses["average"] != losses["run"]


def test_pictures(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = ("--data", tiny_data / "validation", "--needle", "--recall", "--cases", "1")
    whole = evaluate(trained / "model", *words, "--out", tmp_path / "out", "--limit", "40")
    shared = evaluate(trained / "run", *words, ranks=2)
    for name in ("needle", "recall"):
        for one, other in zip(whole[name], shared[name], strict=True):
            assert other == pytest.approx(one, abs=1e-4)
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["results"] == whole
    for name in ("by_position", "needle", "recall"):
        assert (tmp_path / f"out/{name}.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("words", "ranks", "says"),
    [
        ((), 1, "nothing to evaluate: name --data FOLDER"),
        (("--needle",), 1, "--needle hides sentences in text"),
        (("--recall", "--tensor", "3"), 2, "tensor 3 × pipeline 1 × context 1 = 3 ranks does not"),
        (("--recall", "--tensor", "4"), 4, "parallel.tensor=4 does not divide model.num_kv_heads"),
        (("--data", "/nowhere"), 1, "/nowhere: no such folder"),
        (("--tasks", "no_such_task"), 1, "the harness has no such task"),
    ],
)
def test_what_cannot_be_done(trained: Path, words: tuple[str, ...], ranks: int, says: str) -> None:
    for end in run_command("evaluate", trained / "run", *words, ranks=ranks):
        assert end.code != 0
        assert says in paragraph(end.output)


@pytest.mark.parametrize(
    ("saved", "ranks", "expected"),
    [
        ({}, 4, (1, 1, 1)),  # an averaged or imported checkpoint has no layout
        ({"tensor": 2}, 4, (2, 1, 1)),
        ({"tensor": 2, "context": 2}, 2, (1, 1, 1)),
    ],
)
def test_layout_is_the_checkpoint_s_where_it_fits(
    saved: dict[str, Any], ranks: int, expected: tuple[int, ...]
) -> None:
    found = evaluation_layout(ModelConfig(), saved, {}, ranks)
    assert (found.tensor, found.pipeline, found.context) == expected


def test_exported_model_on_two_ranks_and_other_data(trained: Path, tiny_data: Path) -> None:
    for end in run_command("evaluate", trained / "model", "--recall", ranks=2):
        assert end.code == 2
        assert "which one process evaluates, not the 2" in paragraph(end.output)
    prepare(
        [trained / "text.jsonl"], tiny_data / "tokenizer.json", trained / "odd", 63,
        validation_fraction=0.0,
    )  # fmt: skip
    for end in run_command(
        "evaluate", trained / "run", "--data", trained / "odd/train", "--context", "2", ranks=2
    ):
        assert "this layout splits them into 2; use other" in paragraph(end.output)
    short = ("--data", tiny_data / "validation", "--max-length", "32")
    (end,) = run_command("evaluate", trained / "model", *short)
    assert "use --max-length 64" in paragraph(end.output)


def test_damaged_checkpoint_is_named_on_every_rank(trained: Path, tmp_path: Path) -> None:
    step = trained / "run/checkpoints/step-00000006"
    copy = tmp_path / "step-00000006"
    copy.mkdir()
    for file in step.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = next(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    for end in run_command("evaluate", copy, "--recall", ranks=2):
        assert end.code == 1
        assert shard.name in paragraph(end.output)


def test_small_blocks_change_no_score(
    trained: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows and of the head's tokens: as many passes as rows, several blocks a row."""
    dataset = PackedDataset(tiny_data / "validation")
    model = ExportedModel(trained / "model", device="cpu")
    rows = [Row(dataset[i].tokens.tolist()[:n], range(1, n)) for i, n in enumerate((60, 9, 33))]
    whole = (score_dataset(model, dataset, 5), score_rows(model, rows))
    for module in ("models", "rows"):
        monkeypatch.setattr(f"pretrain.evaluation.{module}.TOKENS_AT_ONCE", 70)
    monkeypatch.setattr("pretrain.evaluation.models.HEAD_TOKENS", 7)
    cut = (score_dataset(model, dataset, 5), score_rows(model, rows))
    assert torch.allclose(cut[0], whole[0], rtol=1e-5)
    for found, expected in zip(cut[1], whole[1], strict=True):
        assert found.nats == pytest.approx(expected.nats, rel=1e-5)
        assert (found.tokens, found.missed) == (expected.tokens, expected.missed)
