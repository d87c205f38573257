"""Token ids of real text, for comparing models: of a run's data, or of text that Python brings."""

import sysconfig
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.remote import is_remote
from untrusted.tokenizer_json import as_in_training


def real_tokens(state: dict[str, Any], tokenizer_json: Path, length: int) -> tuple[list[int], str]:
    """Up to `length` token ids and where they come from.

    state: a checkpoint's manifest. Its validation data is tried first, then its training data; then
    text of the Python installation with the checkpoint's tokenizer. Raises DataError when no text
    can be had.
    """
    from checkpoints_tools.single_gpu import ModelError
    from checkpoints_tools.tokenizer_file import parse_tokenizer, read_tokenizer

    try:
        content = read_tokenizer(tokenizer_json)
        tokenizer = as_in_training(parse_tokenizer(content, tokenizer_json))
    except ModelError as error:
        raise DataError(str(error)) from error
    for folder in _folders(state):
        if is_remote(folder):  # may be slow, or out of reach from here
            continue
        try:
            dataset = PackedDataset(folder, tokenizer=content)
            text = _beginning(dataset, length)
        except (DataError, OSError, ImportError):
            continue
        if len(text) > 1:
            return text, folder
    ids, where = _of_python(tokenizer, state["config"]["model"]["vocab_size"], length)
    if len(ids) < min(2, length):
        raise DataError(
            f"{tokenizer_json} makes no tokens of the text of {where}; use --no-verify, or make "
            "the data of the run readable here"
        )
    return ids, where


def _beginning(dataset: PackedDataset, length: int) -> list[int]:
    text: list[int] = []
    for index in range(len(dataset)):
        if len(text) >= length:
            break
        sample = dataset[index]
        text += sample.tokens[: sample.tokens.size - sample.num_pad].tolist()
    return text[:length]


def _folders(state: dict[str, Any]) -> list[str]:
    try:
        data = DataConfig.model_validate(state["config"]["data"])
    except (ValidationError, KeyError):  # of another version of the program, or imported
        return []
    training = [data.train] if data.train else [source.path for source in data.sources]
    return [*data.validation_sets.values(), *training]


def _of_python(tokenizer: Any, vocab_size: int, length: int) -> tuple[list[int], str]:
    """Ids of text that comes with Python, of the vocabulary alone, and where it lies."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in (folder / name for name in ("LICENSE.txt", "this.py", "ast.py")):
        if not path.exists():
            continue
        ids: list[int] = tokenizer.encode(path.read_text("utf-8"), add_special_tokens=False).ids
        ids = [i for i in ids if i < vocab_size][:length]
        if len(ids) >= min(2, length):
            return ids, str(path)
    return [], str(folder)
