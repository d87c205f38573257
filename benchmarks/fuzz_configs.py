"""Generated configurations: valid ones with wild values in up to three fields."""

import copy
import random
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from benchmarks.damage import damage_value, hostile_value
from data_pipeline.config import SourceConfig, StageConfig
from pretrain.config import Config, ConfigError, parse_config

MILD: dict[str, dict[str, list[Any]]] = {
    "model": {
        "num_layers": [1, 2, 3, 4, 6], "hidden_size": [8, 32, 48], "num_heads": [1, 2, 4, 8],
        "num_kv_heads": [1, 2, 4], "head_dim": [2, 8, 16], "state_dim": [2, 16], "vocab_size":
        [300, 301, 512], "ssd_groups": [1, 2, 4], "chunk_size": [0, 16, 64], "ssd_skip": [True],
        "attn_layer_period": [1, 2, 8], "attn_layer_offset": [0, 1, 9], "ssd_conv_width": [0, 4],
        "rope": ["unified", "attention_only", "none"], "tie_word_embeddings": [True, False],
        "rope_scaling": [
            {}, {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64},
        ],
    },
    "parallel": {
        "tensor": [1, 2], "pipeline": [1, 2], "virtual_pipeline": [1, 2], "context": [1, 2],
        "sequence": [True, False, "auto"], "zero_stage": [0, 1, 2, 3], "recompute_layers": [0, 1],
        "offload": ["none", "optimizer"], "recompute": ["none", "selective", "full"],
        "pipeline_split": ["balanced", [2, 2], [1, 3]],
    },
    "data": {"num_workers": [0, 1, 2], "shuffle_window": [1, 64, 4096], "skip_bad_shards": [0, 2]},
    "optimizer": {
        "schedule": ["cosine", "wsd"], "warmup_fraction": [0.0, 0.5], "weight_decay": [0.0, 0.1],
        "clip_grad_norm": [0.0, 1.0],
    },
    "training": {
        "global_batch_size": [1, 2, 4, 8], "micro_batch_size": [1, 2, 4], "eval_every": [0, 1],
        "dtype": ["bf16", "fp32"], "deterministic": [True], "on_bad_step": ["skip", "stop"],
    },
    "checkpoint": {"every": [0, 1], "keep_last": [1, 2], "async_save": [True, False]},
    "logging": {"every": [1, 3], "vitals_every": [0, 1], "profile_steps": [[], [1]],
                "stragglers_every": [0, 1], "prometheus_file": ["", "metrics.prom"]},
}  # fmt: skip
SECTIONS_OF_ONE_PROCESS = [name for name in MILD if name != "parallel"] * 2
WRITTEN = ("run_dir", "dir", "cache_dir", "prometheus_file")  # places that a user may choose
MOST_TOKENS, MOST_WIDTH, MOST_LAYERS = 1 << 14, 512, 32  # of a step that ends within seconds


def wild_config(choice: random.Random, base: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A tree of plain values, and which fields are wild. base: of a valid configuration."""
    tree = copy.deepcopy(base)
    for _ in range(choice.choice([0, 1, 2, 3])):
        section = choice.choice([*MILD, *SECTIONS_OF_ONE_PROCESS])
        field = choice.choice(list(MILD[section]))
        tree[section][field] = copy.deepcopy(choice.choice(MILD[section][field]))
    if choice.random() < 0.15:
        _blend(tree, choice)
    wild = [_make_wild(tree, choice) for _ in range(choice.choice([0, 1, 1, 1, 1, 2, 3]))]
    return _kept_inside(tree), ", ".join(wild)


def is_light(tree: dict[str, Any]) -> bool:
    """Whether a step of this configuration, if it is one, ends within seconds."""
    try:
        config = parse_config(copy.deepcopy(tree))
    except ConfigError:
        return True
    model = config.model
    widest = max(
        model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim,
        model.ssd_groups * model.state_dim, model.vocab_size // 64,
    )  # fmt: skip
    tokens = max(phase.tokens_per_step for phase in config.phases)
    return tokens <= MOST_TOKENS and widest <= MOST_WIDTH and model.num_layers <= MOST_LAYERS


def _make_wild(tree: dict[str, Any], choice: random.Random) -> str:
    section = choice.choice(list(Config.model_fields))
    where = tree.get(section)
    if choice.random() < 0.05 or not isinstance(where, dict):
        tree[section] = hostile_value(choice, Path("x"))
        return section
    if choice.random() < 0.1:
        tree[section], what = damage_value(where, choice, Path("x"))
        return f"{section}: {what}"
    info = Config.model_fields[section]
    fields = typing.cast(type[BaseModel], info.annotation).model_fields
    name = choice.choice(list(fields))
    limits = [
        limit
        for rule in fields[name].metadata
        for limit in (getattr(rule, "ge", None), getattr(rule, "le", None),
                      getattr(rule, "gt", None), getattr(rule, "lt", None))
        if limit is not None
    ]  # fmt: skip
    if limits and choice.random() < 0.5:
        limit = choice.choice(limits)
        where[name] = choice.choice([limit, limit, limit - 1, limit + 1, type(limit)(limit / 2)])
    else:
        where[name] = hostile_value(choice, Path("x"))
    return f"{section}.{name}"


def _blend(tree: dict[str, Any], choice: random.Random) -> None:
    """Several sources, and stages, in the place of data.train; some of their fields are wild."""
    data = tree["data"]
    path = data.pop("train", "")
    sources: list[dict[str, Any]] = [
        {"path": path, "name": "a", "weight": 1.0},
        {"path": choice.choice(["data/validation", "data-zstd/train"]), "name": "b"},
    ]
    stages: list[dict[str, Any]] = [{"from_tokens": 512, "weights": {"b": 1.0}}]
    for entries, kind in ((sources, SourceConfig), (stages, StageConfig)):
        if choice.random() < 0.5:
            entry = choice.choice(entries)
            entry[choice.choice(list(kind.model_fields))] = hostile_value(choice, Path("x"))
    data |= {"sources": sources, "stages": stages[: choice.choice([0, 1])]}


def _kept_inside(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the places that a run writes to, which its user may choose, in its folder."""
    for section in tree.values():
        for name in WRITTEN if isinstance(section, dict) else ():
            text = section.get(name)
            if isinstance(text, str) and ("/" in text or text.startswith(".")):
                section[name] = text.replace("/", "_").replace("..", "_")
    return tree
