"""What makes a single-GPU folder loadable by Hugging Face transformers, apart from the weights.

The modelling file is the source of `single_gpu` without its reading of JSON, followed by that
of `hugging_face_model` without its import of the former. Neither transformers nor the wrapper is
imported here: an export needs only the text.
"""

import ast
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints_tools.single_gpu import ModelError, TransXSSMConfig
from checkpoints_tools.tokenizer_file import TOKENIZER, parse_tokenizer, read_tokenizer

MODEL_SOURCE = Path(__file__).with_name("single_gpu.py")
WRAPPER_SOURCE = Path(__file__).with_name("hugging_face_model.py")
MODELING = "modeling_transxssm"
CONFIG_CLASS, MODEL_CLASS = "TransXSSMPretrainedConfig", "TransXSSMForCausalLM"
# What an export does without: transformers reads the folder and wraps the backbone.
LEFT_OUT = {
    "HF_BOOKKEEPING",
    "FIELD_TYPES",
    "MOST",
    "TransXSSMConfig.from_values",
    "TransXSSMConfig.to_json",
    "TransXSSM",
}
RULE = "# " + "-" * 84 + " "


def write_hugging_face_files(folder: Path, config: TransXSSMConfig, tokenizer_json: Path) -> None:
    """Write config.json, the modelling file, generation_config.json and the tokenizer's two files.

    `folder` exists and gets model.safetensors from the caller; `tokenizer_json` is the file the
    training data was prepared with. Raises ModelError when that is no tokenizer, or when the
    model's special tokens are not in it; OSError when a file cannot be written.
    """
    written = asdict(config) | {
        "architectures": [MODEL_CLASS],
        "auto_map": {
            "AutoConfig": f"{MODELING}.{CONFIG_CLASS}",
            "AutoModelForCausalLM": f"{MODELING}.{MODEL_CLASS}",
        },
    }
    write_json(folder / "config.json", written)
    (folder / f"{MODELING}.py").write_text(modeling_source(), encoding="utf-8")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(config, name) for name in names}
    write_json(folder / "generation_config.json", {n: i for n, i in ids.items() if i is not None})
    write_tokenizer(folder, config, tokenizer_json)


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ tokenizer


def write_tokenizer(folder: Path, config: TransXSSMConfig, tokenizer_json: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, so that text becomes what it was in training.

    That is: nothing added at its ends, nothing cut. Only what spells a special token becomes that
    token, as transformers' users expect; there, `split_special_tokens=True` makes it the plain text
    that it was in training. Tokens that are added later are one id each.
    """
    content = read_tokenizer(tokenizer_json)
    tokenizer = parse_tokenizer(content, tokenizer_json)
    file = folder / TOKENIZER
    adds_tokens = tokenizer.num_special_tokens_to_add(is_pair=False) > 0
    has_dropout = getattr(tokenizer.model, "dropout", None) is not None
    if adds_tokens or has_dropout or tokenizer.truncation or tokenizer.padding:
        values = json.loads(content)  # sound: the library has read it
        values |= {"truncation": None, "padding": None}
        if adds_tokens:
            values["post_processor"] = None
        if has_dropout:
            values["model"]["dropout"] = None
        write_json(file, values)
    else:
        file.write_bytes(content)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "pad"):
        token_id = getattr(config, f"{name}_token_id")
        if token_id is None:
            continue
        token = tokenizer.id_to_token(token_id)
        if token is None:
            raise ModelError(
                f"{tokenizer_json} has no token {token_id}, which is the model's {name}_token_id: "
                "name the tokenizer that the training data was prepared with."
            )
        settings[f"{name}_token"] = token
    write_json(folder / "tokenizer_config.json", settings)


# ------------------------------------------------------------------------------------ source


def modeling_source() -> str:
    """The text of the modelling file: header, imports, the model, the wrapper."""
    model, wrapper = (parse(file) for file in (MODEL_SOURCE, WRAPPER_SOURCE))
    body = "".join(kept_pieces(*model)).strip("\n")
    end = "".join(kept_pieces(*wrapper)).strip("\n")
    body = f"{body}\n\n\n{RULE}transformers\n\n{end}\n"
    # its last paragraph is about the source
    docstring = (ast.get_docstring(model[1], clean=False) or "").rpartition("\n\n")[0]
    header = (
        f"# Generated by `transxssm checkpoint export`, transxssm {own_version()}, from its files\n"
        f"# checkpoints_tools/{MODEL_SOURCE.name} and {WRAPPER_SOURCE.name}: change those.\n"
    )
    imports = import_lines([*model[1].body, *wrapper[1].body], body)
    return f'{header}"""{docstring}\n"""\n\n{imports}\n{body}'


def own_version() -> str:
    try:
        return importlib.metadata.version("transxssm")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def parse(file: Path) -> tuple[list[str], ast.Module]:
    """The lines of a source file, line ends included, and its syntax tree."""
    source = file.read_text(encoding="utf-8")
    return source.splitlines(keepends=True), ast.parse(source)


def kept_pieces(lines: list[str], module: ast.Module) -> Iterator[str]:
    """The text of each top-level statement that goes into the export, with comments above it."""
    end = 0  # lines before this one are dealt with
    for node in module.body:
        start, end = end, node.end_lineno or node.lineno
        is_docstring = node is module.body[0]
        if (
            is_docstring
            or isinstance(node, ast.Import | ast.ImportFrom)
            or name_of(node) in LEFT_OUT
        ):
            continue
        dropped: set[int] = set()
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            if f"{name_of(node)}.{name_of(item)}" in LEFT_OUT:
                decorators = getattr(item, "decorator_list", [])
                first = min(part.lineno for part in (item, *decorators))
                dropped |= set(range(first - 2, item.end_lineno or first))  # and a blank line
        yield "".join(lines[i] for i in range(start, end) if i not in dropped)


def name_of(node: ast.stmt) -> str:
    """What a statement defines: a function's, class's or constant's name, or ''."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else ""


def import_lines(statements: list[ast.stmt], body: str) -> str:
    """The imports among `statements` that `body` uses, merged and in the order that ruff wants.

    Those from this project go: what they name is in the body.
    """
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    whole: set[str] = set()  # import a.b as c
    parts: dict[str, set[str]] = {}  # from a.b import c, d
    for node in statements:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) not in used:
                continue
            if isinstance(node, ast.Import):
                whole.add(ast.unparse(ast.Import([alias])))
            elif node.module and not node.module.startswith("checkpoints_tools"):
                parts.setdefault(node.module, set()).add(alias.name)

    def kind(name: str) -> tuple[int, str]:  # constants, classes, functions
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name.lower())

    lines = sorted(whole)
    lines += [f"from {m} import {', '.join(sorted(parts[m], key=kind))}" for m in sorted(parts)]
    standard = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    others = [line for line in lines if line not in standard]
    return "\n".join([*standard, "", *others, ""])
