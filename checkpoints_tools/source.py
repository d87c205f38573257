"""A sharded checkpoint as exporting, comparing and averaging read it: known to be one model's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools import folder as folders
from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import damaged_files, read_manifest
from checkpoints_tools.single_gpu import ModelError, TransXSSM, TransXSSMConfig
from checkpoints_tools.stored import KINDS, StoredTensors

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A committed checkpoint: its folder, manifest, tensors, and their shapes in model order."""

    step_dir: Path
    manifest: dict[str, Any]
    stored: StoredTensors
    shapes: dict[str, tuple[int, ...]]


def open_source(path: Path, *, checksums: bool) -> Source:
    """The checkpoint that `path` means; with `checksums`, every file is read and compared first.

    Raises CheckpointError when it is damaged, or when its tensors are not exactly those of the
    model that its manifest describes.
    """
    step_dir = folders.resolve(path)
    manifest = read_manifest(step_dir)
    if checksums and (damaged := damaged_files(step_dir, manifest)):
        name, what = next(iter(damaged.items()))
        raise CheckpointError(f"{step_dir / name} {what}; use another checkpoint")
    stored = StoredTensors(step_dir, manifest["files"])
    shapes = parameter_shapes(single_gpu_config(manifest, "fp32"))
    if problems := differing_tensors(stored, shapes):
        raise CheckpointError(
            f"{step_dir} does not hold the model its manifest.json describes: "
            f"{'; '.join(problems[:4])}{f' and {len(problems) - 4} more' * (len(problems) > 4)}; "
            "use another checkpoint"
        )
    return Source(step_dir, manifest, stored, shapes)


def differing_tensors(stored: StoredTensors, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """How the stored weights and moments are not float32 tensors of these shapes, one line each."""
    wanted = {f"{kind}.{name}": shape for kind in KINDS for name, shape in shapes.items()}
    found = {n: t for n, t in stored.tensors.items() if not n.startswith("rng.")}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not of the model" for name in found if name not in wanted]
    for name, shape in wanted.items():
        if name in found and (found[name].shape, found[name].dtype) != (shape, torch.float32):
            kind = str(found[name].dtype).removeprefix("torch.")
            problems.append(
                f"{name} is {kind} {list(found[name].shape)}, not float32 {list(shape)}"
            )
    return problems


def parameter_shapes(config: TransXSSMConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter of a single-GPU model, in its order."""
    with torch.device("meta"):
        model = TransXSSM(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def longest_sequence(state: dict[str, Any]) -> int:
    """Tokens of the longest sequences that a checkpoint was trained on, by its manifest.

    model.max_position_embeddings where it has not been trained. Older manifests do not record it:
    then it is the longest sequence of the run's data.
    """
    limit: int = state["config"]["model"]["max_position_embeddings"]
    trained = state.get("longest_sequence")
    data = state["config"].get("data") or {}
    if trained is None and state.get("tokens"):
        of_sources = [source.get("seq_len") for source in data.get("sources") or []]
        lengths = [n for n in (data.get("seq_len"), *of_sources) if isinstance(n, int)]
        trained = max(lengths, default=0)
    return min(limit, trained or limit)


def single_gpu_config(state: dict[str, Any], dtype: str) -> TransXSSMConfig:
    """The [model] section of a checkpoint under the field names of Hugging Face configurations.

    Raises CheckpointError when its manifest lacks a field, or has one that makes no model.
    """
    try:
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
            max_position_embeddings=longest_sequence(state),
            bos_token_id=state["eod_id"],
            eos_token_id=state["eod_id"],
            pad_token_id=state["pad_id"],
            dtype=str(EXPORT_DTYPES[dtype]).removeprefix("torch."),
        )
    except KeyError as error:
        raise CheckpointError(f"manifest.json lacks {error}; use another checkpoint") from error
    except ModelError as error:
        raise CheckpointError(f"manifest.json describes no model: {error}") from error
