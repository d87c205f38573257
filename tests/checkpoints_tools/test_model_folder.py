"""Folders of a single-GPU model: configuration and weights, and those that are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_tools.model_folder import load_model
from checkpoints_tools.single_gpu import ModelError, TransXSSM, TransXSSMConfig
from tests.checkpoints_tools.tiny_models import TINY, YARN, make_model, make_tokens

# ------------------------------------------------------------------------------------ config


def test_config_round_trips_through_json() -> None:
    config = TransXSSMConfig(**{**TINY, "rope_scaling": YARN, "eos_token_id": 3})
    assert TransXSSMConfig.from_values(json.loads(config.to_json())) == config


def test_config_defaults_follow_the_heads() -> None:
    shape = {k: v for k, v in TINY.items() if k not in ("state_dim", "ssd_groups")}
    config = TransXSSMConfig(**{**shape, "head_dim": 10})
    assert (config.state_dim, config.ssd_groups) == (10, 4)


def test_config_accepts_what_hugging_face_adds() -> None:
    added = {"architectures": ["X"], "auto_map": {}, "transformers_version": "4.57.6"}
    assert TransXSSMConfig.from_values({**TINY, **added}) == TransXSSMConfig(**TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 3}, "unknown fields: hiden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"ssd_groups": 3}, "ssd_groups=3 does not divide num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is not a positive even number"),
        ({"head_dim": "8"}, 'head_dim="8" is not int'),
        ({"num_hidden_layers": True}, "num_hidden_layers=true is not int"),
        ({"rope_theta": "1e4"}, 'rope_theta="1e4" is not float'),
        ({"vocab_size": 0}, "vocab_size=0 is not positive"),
        ({"ssd_conv_width": -1}, "ssd_conv_width=-1 is negative"),
        ({"rope": "partial"}, "rope='partial'"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic': use one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {**YARN, "beta_fats": 1}}, "unknown keys beta_fats"),
    ],
    ids=str,
)
def test_bad_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        TransXSSMConfig.from_values({**TINY, **changes})


def test_config_without_a_required_field_is_refused() -> None:
    values = {name: value for name, value in TINY.items() if name != "hidden_size"}
    with pytest.raises(ModelError, match=r"config\.json lacks hidden_size"):
        TransXSSMConfig.from_values(values)


# ------------------------------------------------------------------------------------ loading


def write_folder(folder: Path, model: TransXSSM, shards: int = 1) -> None:
    (folder / "config.json").write_text(model.config.to_json())
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i in range(shards):
        names = list(tensors)[i::shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_loaded_model_equals_saved(tmp_path: Path, shards: int, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    write_folder(tmp_path, model, shards)
    tokens = make_tokens(1, 9)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


def test_bfloat16_loading_keeps_scan_parameters_in_float32(tmp_path: Path) -> None:
    write_folder(tmp_path, make_model(ssd_skip=True))
    model = load_model(str(tmp_path), dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        wide = name.endswith(("A_log", "dt_bias", "D"))
        assert p.dtype == (torch.float32 if wide else torch.bfloat16), name


def edit(change: Callable[[dict[str, torch.Tensor]], None], folder: Path) -> None:
    tensors = {name: t.clone() for name, t in make_model().state_dict().items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.final_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"parameters without a tensor: {NORM}"),
        (lambda t: t.update(extra=torch.ones(2)), "tensors without a place in the model: extra"),
        (lambda t: t.update({"lm_head.weight": torch.ones(61, 24)}), "in the model: lm_head"),
        (
            lambda t: t.update({NORM: torch.ones(25)}),
            f"{NORM} has shape [25], the model wants [24]",
        ),
        (
            lambda t: t.update({NORM: torch.ones(24, dtype=torch.int64)}),
            f"tensor {NORM} is I64, not F32",
        ),
    ],
    ids=["missing", "extra", "tied-head", "shape", "integers"],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path, make_model())
    edit(change, tmp_path)
    with pytest.raises(ModelError, match=re.escape(message)):
        load_model(tmp_path)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ModelError, match="no safetensors header"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged \(not JSON"):
        load_model(tmp_path)


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    write_folder(tmp_path, make_model(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    values = json.loads(good)
    del values["weight_map"][NORM]
    index.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=f"{NORM} is not where .* places it"):
        load_model(tmp_path)
    index.write_text('{"metadata": {}}')
    with pytest.raises(ModelError, match="weight_map"):
        load_model(tmp_path)
    index.write_text(good)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="has both"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks model-00002-of-00002"):
        load_model(tmp_path)
