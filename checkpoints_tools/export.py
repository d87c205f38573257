"""From a sharded checkpoint to a single-GPU folder: config.json, model.safetensors, tokenizer.

One process, no GPU, neither DeepSpeed nor Megatron-core: the stored tensors are already global.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import read_manifest
from checkpoints_tools.single_gpu import TransXSSM, TransXSSMConfig

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREFIX = "weight."


def export_checkpoint(step_dir: Path, out: Path, dtype: str = "fp32") -> int:
    """Write the float32 weights of a checkpoint as a single-GPU model; returns the parameter count.

    Raises CheckpointError when the checkpoint is unsound, when its tensors are not exactly those of
    the model it says it is, or when `out` exists.
    """
    step_dir = folders.resolve(step_dir)
    state = read_manifest(step_dir)
    if out.exists():
        raise CheckpointError(f"{out} exists; name a new folder for the exported model")
    config = single_gpu_config(state, dtype)
    weights = _read_weights(step_dir, config)
    target = EXPORT_DTYPES[dtype]
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(
            {name: weight.to(target) for name, weight in weights.items()},
            temporary / "model.safetensors",
            metadata={"format": "pt"},
        )
        (temporary / "config.json").write_text(config.to_json())
        shutil.copyfile(step_dir / "tokenizer.json", temporary / "tokenizer.json")
        temporary.rename(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"writing {out} failed: {error}") from error
    return sum(weight.numel() for weight in weights.values())


def single_gpu_config(state: dict[str, Any], dtype: str) -> TransXSSMConfig:
    """The [model] section of a checkpoint under the field names of Hugging Face configurations."""
    model = state["config"]["model"]
    return TransXSSMConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["intermediate_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_kv_heads"],
        head_dim=model["head_dim"],
        state_dim=model["state_dim"],
        ssd_groups=model["ssd_groups"],
        ssd_chunk_size=model["chunk_size"],
        ssd_skip=model["ssd_skip"],
        ssd_conv_width=model["ssd_conv_width"],
        attn_layer_period=model["attn_layer_period"],
        attn_layer_offset=model["attn_layer_offset"],
        rope=model["rope"],
        rope_theta=model["rope_theta"],
        rope_scaling=model["rope_scaling"] or None,
        rms_norm_eps=model["rms_norm_eps"],
        tie_word_embeddings=model["tie_word_embeddings"],
        max_position_embeddings=model["max_position_embeddings"],
        bos_token_id=state["eod_id"],
        eos_token_id=state["eod_id"],
        pad_token_id=state["pad_id"],
        dtype=str(EXPORT_DTYPES[dtype]).removeprefix("torch."),
    )


def _read_weights(step_dir: Path, config: TransXSSMConfig) -> dict[str, torch.Tensor]:
    """Every weight of the model, whole, float32; exactly those the model has."""
    reader = FileSystemReader(step_dir)
    stored = {
        name.removeprefix(PREFIX): tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in TransXSSM(config).named_parameters()}
    if stored != wanted:
        different = sorted(set(stored.items()) ^ set(wanted.items()))
        raise CheckpointError(
            f"{step_dir} does not hold the model its manifest.json describes: "
            f"{len(different)} tensors differ, first {different[:2]}"
        )
    tensors = {PREFIX + name: torch.empty(shape) for name, shape in wanted.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
