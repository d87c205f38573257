"""Loads exported folders where this project cannot be imported; run by test_hugging_face.py.

Arguments: a JSON list of {"folder", "prompts", "new_tokens"}, and the packages that may not be
imported, by commas. `kernels` is found through PYTHONPATH alone: transformers looks for a package
of that name, so it has to be absent, not to fail. Prints what transformers made of each folder.
"""

import importlib.abc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

BLOCKED = sys.argv[2].split(",")


class Blocker(importlib.abc.MetaPathFinder):
    """Makes importing a blocked package fail as if it were not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


editable = [finder for finder in sys.meta_path if "editable" in str(finder)]
sys.meta_path[:] = [Blocker(), *(f for f in sys.meta_path if f not in editable)]

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
    return [int(t) for t in found[0, len(prompt) :]]


def examine(folder: Path, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    copy = folder / "saved"
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    again, narrow = load(copy), load(folder, dtype=torch.bfloat16)
    before, after = model.state_dict(), again.state_dict()
    narrow.generate(torch.tensor([prompts[0]]), max_new_tokens=3, do_sample=False)
    text = "Some text <|endoftext|> ünd more"
    batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
    return {
        "module": type(model).__module__,
        "config": type(config).__name__,
        "loading": {name: len(found) for name, found in info.items()},
        "tokens": [greedy(model, prompt, new_tokens) for prompt in prompts],
        "saved_is_equal": list(before) == list(after)
        and all(torch.equal(before[name], after[name]) for name in before),
        "saved_tokens": [greedy(again, prompt, new_tokens) for prompt in prompts],
        "float32": sorted(n for n, p in narrow.named_parameters() if p.dtype == torch.float32),
        "text_ids": tokenizer(text, split_special_tokens=True)["input_ids"],
        "decoded": tokenizer.decode(tokenizer(text)["input_ids"]),
        "tokenizer": type(tokenizer).__name__,
        "special": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length],
        "batch": {name: tensor.tolist() for name, tensor in batch.items()},
    }


def imported() -> list[str]:
    return sorted({name.split(".")[0] for name in sys.modules} & set(BLOCKED))


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    found = [examine(Path(j["folder"]), j["prompts"], j["new_tokens"]) for j in jobs]
    kernels = "kernels.ssd.ssd" in sys.modules
    print(json.dumps({"folders": found, "imported": imported(), "kernels": kernels}))
