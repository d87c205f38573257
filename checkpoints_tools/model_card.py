"""README.md of an exported model: what it is and where it comes from."""

import re
from collections.abc import Iterable
from typing import Any

from checkpoints_tools.single_gpu import TransXSSMConfig
from checkpoints_tools.source import Source
from checkpoints_tools.token_card import token_section
from checkpoints_tools.tokenizer_file import TOKENIZER
from checkpoints_tools.usage_card import usage_section

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

{usage}
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
        usage=usage_section(config),
        provenance=_table(provenance(source, num_parameters)),
        files="\n".join(f"- `{name}`" for name in files),
    )


def provenance(source: Source, num_parameters: int) -> dict[str, str]:
    """What the checkpoint's manifest says of how the weights came about: names, but no paths."""
    state = source.manifest
    averaged = [
        f"step {a.get('step') or 0:,} ({a.get('tokens') or 0:,} tokens)"
        for a in state.get("averaged", [])
    ]
    imported = state.get("imported", {})
    # an imported checkpoint's configuration is that of a run to come, whose data it has not read
    has_read = bool(state.get("samples")) or not imported
    fields = {
        "parameters": f"{num_parameters:,}",
        "training data": data_names(state["config"].get("data") or {}) if has_read else None,
        "longest training sequences": _number(state.get("longest_sequence")),
        "validation loss": _evaluation(state.get("evaluation")),
        "training tokens": f"{state.get('tokens', 0):,}",
        "training samples": f"{state.get('samples', 0):,}",
        "step": f"{state['step']:,}",
        "data fingerprint": state.get("data_fingerprint") if has_read else None,
        "tokenizer (sha256)": state.get("tokenizer_hash"),
        "git revision": state.get("git_revision"),
        "versions": _pairs(state.get("versions")),
        "saved at": state.get("saved_at"),
        "source checkpoint": f"{run_name(state['config'])}{source.step_dir.name}",
        "average of": ", ".join(averaged),
        "imported from": place_name(str(imported["folder"])) if "folder" in imported else None,
    }
    optional = ("average of", "imported from")
    return {n: str(v or "not recorded") for n, v in fields.items() if v or n not in optional}


def data_names(data: dict[str, Any]) -> str | None:
    """What the [data] section's sources are called, with their weights where there are several."""
    sources = data.get("sources") or []
    if len(sources) < 2:
        only = sources[0].get("name") if sources else place_name(str(data.get("train") or ""))
        return str(only) if only else None
    return ", ".join(f"{s.get('name')} (weight {s.get('weight', 1.0):g})" for s in sources)


def place_name(path: str) -> str:
    """The name of a folder or URL: its last part that is not a split of a data set."""
    address = path.rpartition("://")[2].partition("?")[0].rpartition("@")[2]
    parts = [part for part in re.split(r"[/\\]", address) if part not in ("", ".", "..", "~")]
    names = [part for part in parts if part not in ("train", "validation")]
    return (names or parts or [""])[-1]


def run_name(config: dict[str, Any]) -> str:
    """What the run's folder is called, to stand before a step's."""
    name = place_name(str((config.get("logging") or {}).get("run_dir") or ""))
    return f"{name}, " if name else ""


def _number(value: int | None) -> str | None:
    return f"{value:,} tokens" if value else None


def _evaluation(evaluation: dict[str, Any] | None) -> str | None:
    if not evaluation:
        return None
    return f"{evaluation['validation_loss']:.4f} nats a token, after step {evaluation['step']:,}"


def _pairs(versions: Any) -> str | None:
    return ", ".join(f"{n} {v}" for n, v in versions.items()) if versions else None


def _table(fields: dict[str, str]) -> str:
    rows = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in fields.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
