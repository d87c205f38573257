"""README.md of an exported model: what it is and where it comes from."""

import json
from collections.abc import Iterable
from typing import Any

from checkpoints_tools.single_gpu import TransXSSMConfig
from checkpoints_tools.source import Source
from checkpoints_tools.token_card import token_section
from checkpoints_tools.tokenizer_file import TOKENIZER

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- transxssm
---

# TransXSSM, {parameters:,} parameters

A causal language model of {layers} layers, {attention} of attention and {ssd} of state-space
duality, that share one rotary position encoding. Weights are {dtype}, except for those that decide
how fast states decay (`A_log`, `dt_bias`, `D`), which are float32.

{tokens}
## Where it comes from

{provenance}

## Files

{files}

`transxssm generate` and `checkpoints_tools.model_folder.load_model` read this folder.
"""


def model_card(
    source: Source, config: TransXSSMConfig, num_parameters: int, files: Iterable[str]
) -> str:
    """The card as Markdown with YAML front matter."""
    attention = sum(config.is_attention(i) for i in range(config.num_hidden_layers))
    return CARD.format(
        parameters=num_parameters,
        layers=config.num_hidden_layers,
        attention=attention,
        ssd=config.num_hidden_layers - attention,
        dtype=config.dtype,
        tokens=token_section(config, source.step_dir / TOKENIZER),
        provenance=_table(provenance(source, num_parameters)),
        files="\n".join(f"- `{name}`" for name in files),
    )


def provenance(source: Source, num_parameters: int) -> dict[str, str]:
    """What the checkpoint's manifest says of how the weights came about."""
    state = source.manifest
    fields = {
        "parameters": f"{num_parameters:,}",
        "training tokens": f"{state.get('tokens', 0):,}",
        "training samples": f"{state.get('samples', 0):,}",
        "step": f"{state['step']:,}",
        "data fingerprint": state.get("data_fingerprint"),
        "tokenizer (sha256)": state.get("tokenizer_hash"),
        "git revision": state.get("git_revision"),
        "versions": _pairs(state.get("versions")),
        "saved at": state.get("saved_at"),
        "source checkpoint": str(source.step_dir.resolve()),
        "average of": json.dumps(state["averaged"]) if "averaged" in state else None,
        "imported from": json.dumps(state["imported"]) if "imported" in state else None,
    }
    optional = ("average of", "imported from")
    return {n: str(v or "not recorded") for n, v in fields.items() if v or n not in optional}


def _pairs(versions: Any) -> str | None:
    return ", ".join(f"{n} {v}" for n, v in versions.items()) if versions else None


def _table(fields: dict[str, str]) -> str:
    rows = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in fields.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
