"""`transxssm evaluate`: what is asked of a model, printed, and written with pictures."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from checkpoints_tools.folder import resolve
from checkpoints_tools.manifest import model_of, read_manifest
from checkpoints_tools.safetensors_files import is_exported
from data_pipeline.dataset import PackedDataset
from data_pipeline.reading import check_text_field, documents
from parallel.launch import Launch
from pretrain.config import ConfigError
from pretrain.console import print_json, shown, whole_console
from pretrain.evaluation.models import (
    ExportedModel,
    Model,
    ShardedModel,
    evaluation_layout,
)
from pretrain.evaluation.probes import Cell, needle, recall
from pretrain.evaluation.rows import Ids, Row, score_dataset, score_rows, text_rows
from pretrain.evaluation.scores import Scores, by_bins
from untrusted.files import write_durably
from untrusted.numbers import number
from untrusted.secrets import redact_value

HAYSTACK_TOKENS = 1 << 20
PIECE = 1 << 20  # characters
ROWS_AT_ONCE = 1 << 14  # those of one length go into the model together


@dataclass(frozen=True)
class Asked:
    """What to find out."""

    data: tuple[str, ...] = ()
    """Prepared folders."""
    text: tuple[str, ...] = ()
    """Files or folders of text."""
    text_field: tuple[str, ...] = ("text",)
    """Of rows in them: one for all, or one for each."""
    document_separator: str = ""
    needle: bool = False
    recall: bool = False
    cases: int = 8
    """Of a probe, per cell of its picture."""
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None
    """Sequences of a prepared folder, documents of a text or a task, at most."""

    def check(self) -> None:
        """Raises ConfigError."""
        if not (self.data or self.text or self.needle or self.recall or self.tasks):
            raise ConfigError(
                "nothing to evaluate: name --data FOLDER, --text FILE, --tasks NAME, --needle or "
                "--recall"
            )
        if self.needle and not (self.data or self.text):
            raise ConfigError(
                "--needle hides sentences in text; give it some, with --data or --text"
            )


@dataclass
class Found:
    """Results, and the tables and cells that pictures are drawn from."""

    results: dict[str, Any] = field(default_factory=dict)
    bins: dict[str, dict[tuple[int, int], Scores]] = field(default_factory=dict)
    cells: dict[str, list[Cell]] = field(default_factory=dict)


def open_model(
    path: Path, launch: Launch, asked: dict[str, int], dtype: str, max_length: int
) -> Model:
    """An exported folder, or what of a checkpoint `path` means, split as `asked`.

    Raises ModelError, CheckpointError or ConfigError.
    """
    if is_exported(path):
        if launch.world_size > 1:
            raise ConfigError(
                f"{path} is an exported model, which one process evaluates, not the "
                f"{launch.world_size} of this job; name the sharded checkpoint, or start one"
            )
        return ExportedModel(path, dtype=dtype, max_length=max_length)
    step_dir = resolve(path)
    manifest = read_manifest(step_dir)
    config = model_of(manifest)
    layout = evaluation_layout(config, manifest.get("layout", {}), asked, launch.world_size)
    return ShardedModel(
        step_dir, manifest, launch, config, layout, dtype=dtype, max_length=max_length
    )


def evaluate(model: Model, asked: Asked) -> Found:
    """All that was asked. A collective. Raises DataError, ModelError or ConfigError."""
    found = Found()
    sets = {folder: PackedDataset(folder, tokenizer=model.tokenizer_json) for folder in asked.data}
    for folder, dataset in sets.items():
        if dataset.meta.seq_len > model.max_length:
            raise ConfigError(
                f"{folder} has sequences of {dataset.meta.seq_len} tokens, and the model takes "
                f"{model.max_length}; use --max-length {dataset.meta.seq_len}"
            )
        if dataset.meta.seq_len % model.length_multiple:
            raise ConfigError(
                f"{folder} has sequences of {dataset.meta.seq_len} tokens, and this layout splits "
                f"them into {model.length_multiple}; use other --tensor and --context"
            )
    check_text_field(asked.text_field, asked.text)
    fields = asked.text_field * (1 if len(asked.text_field) > 1 else len(asked.text))
    texts = {
        name: _text_ids(model, name, field, asked)
        for name, field in zip(asked.text, fields, strict=True)
    }
    for folder, dataset in sets.items():
        table = score_dataset(model, dataset, asked.limit)
        name = redact_value(folder)
        found.results[name] = _shown(Scores.of(table)) | {"by_position": _by_position(table)}
        found.bins[name] = by_bins(table)
    for name, (ids, size) in texts.items():
        rows = (row for one in ids for row in text_rows(one, model.end_of_text, model.max_length))
        scores = _scored(model, rows)
        # the text's own bytes: what the tokens stand for may be another text
        found.results[name] = _shown(Scores(scores.nats, scores.tokens, scores.missed, size))
    if asked.needle:
        hay = _haystack(sets, texts)
        found.cells["needle"] = needle(model, hay, cases=asked.cases)
    if asked.recall:
        found.cells["recall"] = recall(model, cases=asked.cases)
    for name, cells in found.cells.items():
        found.results[name] = [asdict(cell) for cell in cells]
    if asked.tasks:
        try:
            from pretrain.evaluation.harness import run_tasks
        except ImportError as error:
            raise ConfigError(
                f"--tasks runs lm-evaluation-harness, which is not installed ({error}); "
                "pip install 'transxssm[evaluation]'"
            ) from error
        found.results |= run_tasks(model, asked.tasks, asked.include_path, asked.limit)
    return found


def _text_ids(model: Model, name: str, text_field: str, asked: Asked) -> tuple[list[Ids], int]:
    """Token ids of every document, and the bytes of all."""
    ids: list[Ids] = []
    size = 0
    parts: list[Ids] = []
    for document in documents([name], text_field, separator=asked.document_separator):
        for piece in _pieces(document.text):
            # fast: without the place in the text of every token
            (encoded,) = model.tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            parts.append(np.array(encoded.ids, np.int32))
        size += len(document.text.encode())
        if document.ends:
            ids.append(np.concatenate(parts))
            parts = []
            if asked.limit is not None and len(ids) >= asked.limit:
                break
    return ids, size


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most PIECE characters, which end with a line where they can: while it
    encodes, the library takes hundreds of bytes a token."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def _haystack(sets: dict[str, PackedDataset], texts: dict[str, tuple[list[Ids], int]]) -> list[int]:
    """Tokens of text, without what ends documents."""
    found: list[int] = []
    for ids, _ in texts.values():
        for one in ids:
            found += one[: HAYSTACK_TOKENS - len(found)].tolist()
    for dataset in sets.values():
        skipped = {dataset.meta.eod_id, dataset.meta.pad_id}
        for index in range(len(dataset)):
            if len(found) > HAYSTACK_TOKENS:
                break
            found += [token for token in dataset[index].tokens.tolist() if token not in skipped]
    return found[:HAYSTACK_TOKENS]


def _scored(model: Model, rows: Iterator[Row]) -> Scores:
    """Scores of all rows together, of which only so many are held at a time. A collective."""
    total = Scores(0.0, 0, 0, 0)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        total = _sum([total, *score_rows(model, some)])
    return total


def _sum(scores: Sequence[Scores]) -> Scores:
    return Scores(
        sum(s.nats for s in scores),
        sum(s.tokens for s in scores),
        sum(s.missed for s in scores),
        sum(s.bytes for s in scores),
    )


def _shown(scores: Scores) -> dict[str, Any]:
    return {
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "accuracy": scores.accuracy,
        "tokens": scores.tokens,
        "bytes": scores.bytes,
    }


def _by_position(table: Tensor) -> list[dict[str, Any]]:
    return [
        {"begin": begin, "end": end, "loss": scores.loss, "tokens": scores.tokens}
        for (begin, end), scores in by_bins(table).items()
    ]


def write(found: Found, model: Model, out: Path) -> None:
    """results.json and pictures, in a folder."""
    from pretrain.evaluation.pictures import heat_map, loss_by_position

    out.mkdir(parents=True, exist_ok=True)
    for index, (name, bins) in enumerate(found.bins.items()):
        path = out / ("by_position.png" if not index else f"by_position-{index + 1}.png")
        loss_by_position(bins, f"{name}, by {model.name}", path)
    rows = {"needle": "depth of the needle", "recall": "pairs"}
    for name, cells in found.cells.items():
        heat_map(cells, rows[name], f"{name}, by {model.name}", out / f"{name}.png")
    text = json.dumps({"model": model.name, "results": found.results}, indent=1) + "\n"
    write_durably(out / "results.json", text.encode())


def show(found: Found) -> None:
    """On the console."""
    table = Table("", "loss", "perplexity", "bits per byte", "accuracy", "tokens")
    for name, result in found.results.items():
        if "bits_per_byte" in result and "perplexity" in result:
            table.add_row(
                name, number(result["loss"], 5), number(result["perplexity"], 5),
                number(result["bits_per_byte"], 5), f"{result['accuracy']:.2%}",
                number(result["tokens"]),
            )  # fmt: skip
    console = whole_console()
    if table.row_count:
        console.print(table)
    for name, bins in found.bins.items():
        line = ", ".join(f"from {begin:,} {number(s.loss)}" for (begin, _), s in bins.items())
        console.print(f"{name}: loss by tokens of the document before: {line}")
    for name, cells in found.cells.items():
        best, mean = max(c.gain for c in cells), sum(c.gain for c in cells) / len(cells)
        share = sum(c.found for c in cells) / len(cells)
        console.print(
            f"{name}: {share:.1%} of the answers' tokens are the likeliest; they gain "
            f"{number(mean)} nats on average, {number(best)} at best"
        )
    for name, result in found.results.items():
        if isinstance(result, dict) and "by_position" not in result and "tokens" not in result:
            line = ", ".join(
                f"{metric} {number(value, 5)}"
                for metric, value in result.items()
                if isinstance(value, float)
            )
            console.print(f"{name}: {line}")


def run(
    path: Path,
    launch: Launch,
    asked: Asked,
    layout: dict[str, int],
    *,
    dtype: str,
    max_length: int,
    out: Path | None,
    json_output: bool,
) -> None:
    """Evaluate as one rank of the job; rank 0 prints and writes."""
    asked.check()
    model = open_model(path, launch, layout, dtype, max_length)
    found = evaluate(model, asked)
    if launch.rank == 0:
        if out is not None:
            write(found, model, out)
            print(shown(f"written to {out}"), file=sys.stderr)
        if json_output:
            print_json(found.results)
        else:
            show(found)
    if isinstance(model, ShardedModel):
        from parallel.groups import destroy_groups

        destroy_groups()
