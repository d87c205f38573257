"""From a single-GPU folder to a sharded checkpoint at step 0 that a run can start from.

One process, a block of rows at a time, without Megatron-core. Weights of any dtype are exact in
float32, so that exporting again gives the same bytes.
"""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.fresh import write_fresh_checkpoint
from checkpoints_tools.model_folder import empty_model
from checkpoints_tools.model_folder import read_config as read_model_config
from checkpoints_tools.safetensors_files import SafetensorsFolder
from checkpoints_tools.single_gpu import ModelError, TransXSSMConfig
from checkpoints_tools.source import single_gpu_config
from checkpoints_tools.stored_writer import Blocks
from checkpoints_tools.tokenizer_file import TOKENIZER, differing_tokenizers, read_tokenizer
from parallel.config import ModelConfig

# [model] fields by those of config.json, where the names differ
RENAMED = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "ssd_chunk_size": "chunk_size",
}
# Of config.json, what is not the model: how it is computed, stored, on how long sequences it was
# trained, and which tokens are special.
NOT_THE_MODEL = {"ssd_chunk_size", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
NOT_THE_MODEL |= {"max_position_embeddings"}


def import_model(
    model_dir: Path,
    out: Path,
    config: dict[str, Any],
    *,
    data_fingerprint: str = "",
    tokenizer: bytes | None = None,
    git_revision: str = "",
) -> Path:
    """Write OUT/step-00000000; its folder.

    config: the whole configuration tree of the run to come; its "model" may be missing, and is
    taken from config.json then. tokenizer: tokenizer.json of the run's data, which must have the
    same identity as the model's; by default the model's own. Raises CheckpointError when the folder
    is no whole model, when the two configurations differ, or when `out` cannot be written.
    """
    described, weights = read_config(model_dir), SafetensorsFolder(model_dir)
    try:
        empty_model(described, weights.shapes(), model_dir)
        own = read_tokenizer(model_dir / TOKENIZER)
        if tokenizer is not None:
            _check_tokenizer(model_dir / TOKENIZER, own, tokenizer)
            own = tokenizer
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(described, name) is None:
            raise CheckpointError(
                f"{model_dir}/config.json has no {name}, which a run's data ends and fills "
                "sequences with; set it"
            )
    if "model" not in config:
        config = {"model": model_section(described, model_dir)} | config
    state = {
        "config": config,
        "data_fingerprint": data_fingerprint,
        "eod_id": described.eos_token_id,
        "pad_id": described.pad_token_id,
        "git_revision": git_revision,
        "imported": {"folder": str(model_dir.resolve()), "dtype": described.dtype},
    }
    _refuse_differences(described, single_gpu_config(state, "fp32"), model_dir)
    state["tokenizer_hash"] = hashlib.sha256(own).hexdigest()

    def read(name: str) -> Blocks:
        for rows, block in weights.blocks(name):
            yield rows, block.to(torch.float32)

    return write_fresh_checkpoint(out, state, weights.shapes(), read, own)


def read_config(model_dir: Path) -> TransXSSMConfig:
    """config.json of an exported folder. Raises CheckpointError."""
    try:
        return read_model_config(model_dir)
    except ModelError as error:
        raise CheckpointError(str(error)) from error


def model_section(described: TransXSSMConfig, model_dir: Path) -> dict[str, Any]:
    """The [model] section of the same model. Raises CheckpointError when it cannot be trained."""
    values = {
        RENAMED.get(field.name, field.name): getattr(described, field.name)
        for field in fields(described)
    }
    values["rope_scaling"] = values["rope_scaling"] or {}
    try:
        model = ModelConfig(**{n: v for n, v in values.items() if n in ModelConfig.model_fields})
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{model_dir}/config.json cannot be trained: {found}") from error
    return model.model_dump(mode="json")


def _refuse_differences(
    described: TransXSSMConfig, wanted: TransXSSMConfig, model_dir: Path
) -> None:
    different = [
        f"model.{RENAMED.get(field.name, field.name)}: {getattr(described, field.name)!r} there, "
        f"{getattr(wanted, field.name)!r} in the configuration"
        for field in fields(described)
        if field.name not in NOT_THE_MODEL
        and getattr(described, field.name) != getattr(wanted, field.name)
    ]
    if different:
        raise CheckpointError(
            f"{model_dir} is another model than the configuration says ({'; '.join(different)}); "
            "make these fields of the configuration those of the model"
        )


def _check_tokenizer(path: Path, own: bytes, of_data: bytes) -> None:
    """Raise CheckpointError if ids would mean other text with the tokenizer of the data."""
    if different := differing_tokenizers(own, of_data, (path, Path("the data's tokenizer.json"))):
        raise CheckpointError(
            f"{path} is another tokenizer than the one that the data was prepared with (they "
            f"differ in {', '.join(different)}); prepare the data with the model's tokenizer"
        )
