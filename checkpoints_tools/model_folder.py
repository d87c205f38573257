"""Reading the folder of a single-GPU model: config.json, and safetensors in one file or several."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.single_gpu import (
    FLOAT32_PARAMETERS,
    ModelError,
    TransXSSM,
    TransXSSMConfig,
    some_names,
)


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TransXSSM:
    """The model of a folder with config.json and model.safetensors (or its index and shards).

    Every tensor of the files fills exactly one parameter and every parameter is filled, or the
    folder is refused: nothing is left at its initial value without a word.
    """
    folder = Path(folder)
    try:
        config = TransXSSMConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{folder} is not a single-GPU model: config.json cannot be read ({error.strerror}). "
            "`transxssm checkpoint export` makes such a folder from a training checkpoint."
        ) from error
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    with torch.device("meta"):
        model = TransXSSM(config)
    expected = dict(model.named_parameters())
    loaded: dict[str, Tensor] = {}
    unknown, problems = set(), []
    for name, tensor in _read_tensors(folder):
        if name in loaded:
            problems.append(f"{name} is stored twice")
        elif name not in expected:
            unknown.add(name)
        elif tensor.shape != expected[name].shape or not tensor.is_floating_point():
            problems.append(
                f"{name} is {_describe(tensor)}, the model wants {_describe(expected[name])}"
            )
            loaded[name] = tensor
        else:
            keep = name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS
            loaded[name] = tensor.to(device=device, dtype=torch.float32 if keep else dtype)
    if unknown:
        problems.append(f"tensors without a place in the model: {some_names(unknown)}")
    if missing := set(expected) - set(loaded):
        problems.append(f"parameters without a tensor: {some_names(missing)}")
    if problems:
        raise ModelError(f"{folder} does not fit its config.json: {'; '.join(problems)}.")
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.eval()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder, checked against the index where there is one."""
    index = folder / "model.safetensors.index.json"
    try:
        weight_map: dict[str, str] | None = None
        files = ["model.safetensors"]
        if index.exists():
            if (folder / "model.safetensors").exists():
                raise ModelError(
                    f"{folder} has both model.safetensors and {index.name}: remove one."
                )
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        for file in files:
            if not (folder / file).is_file():
                raise ModelError(f"{folder} lacks {file}: copy the folder again, whole.")
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    if weight_map is not None and weight_map.get(name) != file:
                        raise ModelError(f"{folder}: {index.name} does not place {name} in {file}.")
                    yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder}: the weights cannot be read: {error}.") from error
