"""Reading the folder of a single-GPU model: config.json, and safetensors in one file or several.

The folder may come from anybody. Files are regular ones in the folder itself, and config.json is
compared with the tensors that are there before anything of its sizes is made.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.safetensors_files import SafetensorsFolder
from checkpoints_tools.single_gpu import (
    FLOAT32_PARAMETERS,
    ModelError,
    TransXSSM,
    TransXSSMConfig,
    some_names,
)
from parallel import bounds
from untrusted.errors import UntrustedError
from untrusted.files import read_regular
from untrusted.records import parse_json
from untrusted.text import printable

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
_VALUES = TypeAdapter(dict[str, Any])


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TransXSSM:
    """Return the model of a folder with config.json and model.safetensors (or index and shards).

    Every tensor of the files fills exactly one parameter and every parameter is filled, or the
    folder is refused with a ModelError: nothing is left at its initial value without a word.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        files = SafetensorsFolder(folder)
        model = empty_model(config, files.shapes(), folder)
        loaded = {}
        for name in model.state_dict():
            keep = name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS
            loaded[name] = files.tensor(name).to(device, torch.float32 if keep else dtype)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.eval()


def read_config(folder: Path) -> TransXSSMConfig:
    """Return what config.json of a folder says. Raises ModelError."""
    path = folder / CONFIG
    try:
        content = read_regular(path, MAX_CONFIG_BYTES)
        values = parse_json(content, _VALUES, str(path), "copy the folder again, whole")
        return TransXSSMConfig.from_values(values)
    except OSError as error:
        raise ModelError(
            f"{folder} is not a single-GPU model: {CONFIG} cannot be read ({error.strerror}). "
            "`transxssm checkpoint export` makes such a folder from a training checkpoint."
        ) from error
    except UntrustedError as error:
        raise ModelError(str(error)) from error
    except ModelError as error:
        raise ModelError(printable(f"{folder}: {error}")) from error


def empty_model(
    config: TransXSSMConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> TransXSSM:
    """Return the model of a config.json without memory (on the meta device).

    shapes: of the folder's tensors. Raises ModelError unless they are exactly the model's.
    """
    refuse_larger_model(config, shapes, str(folder / CONFIG))
    with torch.device("meta"):
        model = TransXSSM(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems = [
        f"{name} has shape {list(shapes[name])}, the model wants {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if unknown := shapes.keys() - expected.keys():
        problems.append(f"tensors without a place in the model: {some_names(unknown)}")
    if missing := expected.keys() - shapes.keys():
        problems.append(f"parameters without a tensor: {some_names(missing)}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ModelError(f"{folder} does not fit its {CONFIG}: {'; '.join(problems[:4])}{more}.")
    return model


def refuse_larger_model(
    config: TransXSSMConfig, shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise ModelError when a configuration is of a far larger model than the tensors there are.

    For numbers that are damaged or made up: building such a model, even without memory, would not
    end. Each product is the size of one of its weights. source: of the configuration.
    """
    c = config
    stored = sum(prod(shape) for shape in shapes.values())
    numbers = (re.match(r"model\.layers\.(\d+)\.", name) for name in shapes)
    layers = {match[1] for match in numbers if match}
    sizes: Iterable[tuple[str, int, int]] = (
        ("num_hidden_layers", c.num_hidden_layers, min(len(layers), bounds.LAYERS)),
        ("max_position_embeddings", c.max_position_embeddings, bounds.LENGTH),
        ("vocab_size · hidden_size", c.vocab_size * c.hidden_size, stored),
        ("hidden_size · intermediate_size", c.hidden_size * c.intermediate_size, stored),
        ("num_attention_heads · head_dim", c.num_attention_heads * c.head_dim, stored),
        ("ssd_groups · state_dim", c.ssd_groups * c.state_dim, stored),
        ("ssd_conv_width", c.ssd_conv_width, stored),
    )
    for name, value, most in sizes:
        if value > most:
            raise ModelError(
                f"{source}: {name} = {value:,} is more than {most:,}, and the tensors there are "
                f"{stored:,} values in {len(layers)} layers; use the configuration that belongs to "
                "them."
            )
