"""The mean of several checkpoints' weights, as a checkpoint at step 0; streaming, one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.fresh import write_fresh_checkpoint
from checkpoints_tools.new_folder import refuse_existing
from checkpoints_tools.single_gpu import ModelError
from checkpoints_tools.source import Source, open_source
from checkpoints_tools.stored_writer import Blocks
from checkpoints_tools.tokenizer_file import TOKENIZER, differing_tokenizers, read_tokenizer

KEPT = ("config", "data_fingerprint", "tokenizer_hash", "eod_id", "pad_id", "longest_sequence")


def average_checkpoints(paths: Sequence[Path], out: Path, *, git_revision: str = "") -> Path:
    """Write OUT/step-00000000 with the mean of the float32 weights; its folder.

    Configuration and data are those of the checkpoint trained longest. Sums are float64. Raises
    CheckpointError when a checkpoint is damaged, two are one, or they are of different models.
    """
    if len(paths) < 2:
        raise CheckpointError(f"an average needs two checkpoints or more, {len(paths)} are named")
    refuse_existing(out)
    sources = [open_source(path, checksums=True) for path in paths]
    _check_same_model(sources)
    longest = max(sources, key=lambda source: source.manifest.get("tokens", 0))
    state = {name: longest.manifest.get(name) for name in KEPT} | {
        "git_revision": git_revision,
        "averaged": [
            {"checkpoint": str(source.step_dir.resolve())}
            | {n: source.manifest.get(n) for n in ("step", "tokens", "data_fingerprint")}
            for source in sources
        ],
    }

    def read(name: str) -> Blocks:
        for rows, block in sources[0].stored.blocks(f"weight.{name}"):
            total = block.double()
            for source in sources[1:]:
                total += source.stored.rows(f"weight.{name}", rows)
            yield rows, (total / len(sources)).to(torch.float32)

    try:
        tokenizer = read_tokenizer(longest.step_dir / TOKENIZER)
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    return write_fresh_checkpoint(out, state, longest.shapes, read, tokenizer)


def _check_same_model(sources: list[Source]) -> None:
    first = sources[0]
    seen = {first.step_dir.resolve()}
    for source in sources[1:]:
        if source.step_dir.resolve() in seen:
            raise CheckpointError(f"{source.step_dir} is named twice; name each checkpoint once")
        seen.add(source.step_dir.resolve())
        if different := differing_fields(_model(first.manifest), _model(source.manifest)):
            found = "; ".join(f"{n}: {a!r} and {b!r}" for n, (a, b) in different.items())
            raise CheckpointError(
                f"{first.step_dir} and {source.step_dir} are different models ({found}); average "
                "checkpoints of one model"
            )
        _check_same_tokenizer(first, source)


def _check_same_tokenizer(first: Source, source: Source) -> None:
    if first.manifest["tokenizer_hash"] == source.manifest["tokenizer_hash"]:
        return
    files = (first.step_dir / TOKENIZER, source.step_dir / TOKENIZER)
    try:
        different = differing_tokenizers(read_tokenizer(files[0]), read_tokenizer(files[1]), files)
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    if different:
        raise CheckpointError(
            f"{first.step_dir} and {source.step_dir} are of different tokenizers (they differ in "
            f"{', '.join(different)}); average checkpoints of one model"
        )


def _model(manifest: dict[str, Any]) -> dict[str, Any]:
    of_tokens = {name: manifest.get(name) for name in ("eod_id", "pad_id")}
    model = dict(manifest["config"]["model"])
    model.pop("max_position_embeddings", None)  # in an import it says how far a model was trained
    return {f"model.{name}": value for name, value in model.items()} | of_tokens


def differing_fields(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values of both, by name, where they are not the same; None where one has none."""
    names = [*a, *(name for name in b if name not in a)]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
