"""A tiny configuration for runs in tests: both kinds of layers, groups, GQA, P ≠ N; and text."""

from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import Config, parse_config

MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "state_dim": 16,
    "ssd_groups": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}


def tiny_config(data: Path, run_dir: Path, /, **sections: dict[str, Any]) -> Config:
    """Config on the tiny data; `sections` update single fields, e.g. parallel={"tensor": 2}."""
    tree: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "data": {
            "train": str(data / "train"),
            "validation": str(data / "validation"),
            "seq_len": 64,
        },
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "training": {
            "steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "dtype": "fp32",
            "eval_every": 0,
        },
        "checkpoint": {"every": 0},
        "logging": {"run_dir": str(run_dir), "tensorboard": False},
    }
    for name, fields in sections.items():
        tree.setdefault(name, {}).update(fields)
    return parse_config(tree)


def write_text(folder: Path, num_bytes: int) -> list[Path]:
    """Files of made-up words, frequent and rare ones, the same in every run of the tests."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(random.choice(letters, random.integers(2, 8))) for _ in range(400)]
    odds = 1 / np.arange(1, len(words) + 1)
    files, written = [], 0
    folder.mkdir()
    while written < num_bytes:
        length = int(random.lognormal(4.5, 1.0)) + 5
        text = " ".join(random.choice(words, length, p=odds / odds.sum())) + ".\n"
        files.append(folder / f"{len(files):05d}.txt")
        files[-1].write_text(text)
        written += len(text)
    return files
